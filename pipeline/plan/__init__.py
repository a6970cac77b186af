"""`blip2 plan`: what a job would take, from a sample."""
