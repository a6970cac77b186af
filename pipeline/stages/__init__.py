"""The stages of the job, as Ray Data runs them in its workers."""
