"""`blip2 submit`: run a command as a Ray job on a cluster that exists."""
