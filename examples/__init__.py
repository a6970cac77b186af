"""Short programs, one use each; run them from the repository: `python -m examples.NAME --help`."""
