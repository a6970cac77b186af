"""The HTTP interface: bodies, answers, errors, the page, and the application that the routes make."""
