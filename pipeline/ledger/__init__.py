"""The state of a run in its output folder: what is finished, what is left, and which driver works on it."""
