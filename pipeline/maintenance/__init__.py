"""Look after an output: `blip2 verify` reads it back whole, `blip2 clean` deletes what is of no use."""
