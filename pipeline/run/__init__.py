"""One run of a job: prepare, drive the dataset, commit, reconcile."""
