"""`blip2 demo`: the real job on drawn scenes whose captions are known."""
