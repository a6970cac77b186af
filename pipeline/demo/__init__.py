"""`blip2 demo`: the real job on drawn scenes, each with exactly one correct caption."""
