"""`blip2 report` and `blip2 status`: what a run produced, read from its output folder alone."""
