"""From what the user names as input to shards and the read tasks of Ray Data."""
