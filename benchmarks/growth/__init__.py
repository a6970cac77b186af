"""How the batch job copes with a hundred thousand shards, a store that bills requests, and one huge tar."""
