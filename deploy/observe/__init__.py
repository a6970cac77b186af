"""What operators see of the endpoint: metrics, the access log, and where a request spent its time."""
