"""Answers that are not made twice: shared under way, kept in memory, or read from a finished run."""
