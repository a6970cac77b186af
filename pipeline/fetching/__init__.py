"""Load the images that rows name by their address: URLs, URIs of stores, paths."""
