"""BLIP-2 online and on a cluster: the Serve application, and everything that places the system.

Knows `blip2_actor` alone; the batch job in `pipeline` is its sibling.
"""
