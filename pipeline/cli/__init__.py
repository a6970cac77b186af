"""The command line: flags to settings, settings to commands."""
