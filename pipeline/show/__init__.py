"""`blip2 show` and the end of a run: rows of an output in the terminal."""
