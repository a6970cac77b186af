"""Token selection (logits to token): greedy search, beam search, sampling, logits processors."""
