"""Linear layers in eight bits: their arithmetic, which layers take part, and how weights become bytes."""
