"""`blip2 report` and `blip2 status`: what a run has made, from its output alone."""
