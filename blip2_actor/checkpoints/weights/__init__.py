"""The weights of a checkpoint: which files hold them, what changes them, and where each tensor goes."""
