"""From logits to tokens: greedy search, beam search, sampling, logits processors."""
