"""The HTTP interface: routes, bodies, answers, and the page. Nothing here imports Ray."""
