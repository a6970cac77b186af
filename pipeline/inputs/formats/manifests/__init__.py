"""Manifests, `--input @FILE`: text files whose lines name images, or shards."""
