"""The stages of the job, which Ray Data runs in its workers: decode, caption, write."""
