"""Turn what the user names as input into shards, and shards into the read tasks of Ray Data."""
