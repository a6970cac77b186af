"""A second model on trial: it answers a share of the requests, or makes copies whose answers are dropped."""
