"""One run of a job: prepare it, drive the dataset, commit shards, reconcile."""
