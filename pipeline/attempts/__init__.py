"""The record of every attempt of a run: what ran where, how fast, and how it ended."""
