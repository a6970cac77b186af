"""The HTTP interface: bodies, answers, errors, the files of the page, and the application with all routes."""
