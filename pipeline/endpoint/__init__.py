"""A running endpoint as an engine of the batch job, reached by its documented interface alone."""
