"""BLIP-2 online and on a cluster: the Serve application, and the files that describe clusters.

It imports `blip2_actor` alone; the batch job in `pipeline` is its sibling, and neither imports the other.
"""

APPLICATION = "blip2"
"""The name of the Serve application, here and in `serve_config.yaml`."""
