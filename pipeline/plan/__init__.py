"""`blip2 plan`: what a run would take, predicted from a sample of its input."""
