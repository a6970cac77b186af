"""`blip2 report`, `blip2 status` and `blip2 show`: what a run produced, read from its output folder alone."""
