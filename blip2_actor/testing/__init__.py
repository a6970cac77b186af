"""For tests and benchmarks: an engine of stated cost without a model, and small random checkpoints."""
