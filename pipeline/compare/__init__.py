"""`blip2 compare`: two runs over the same images, row by row."""
