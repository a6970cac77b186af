"""The two sides of each comparison, each run in a process of its own."""
