"""A second model on trial: it answers a share of the requests, or makes copies of them that nobody sees."""
