"""Calls from one process of the endpoint to another, through Serve."""
