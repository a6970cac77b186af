"""`blip2 doctor`: what a run needs of this machine, its network and its storage, checked before a run."""
