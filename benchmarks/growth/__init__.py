"""The case for a hundred thousand shards, for a store that bills each request, and for one huge tar."""
