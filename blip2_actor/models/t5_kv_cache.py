"""The KV cache of T5: for each running text its own tokens, and the prefix for the cross-attention.

Axis letters: `blip2.py`.
"""

from __future__ import annotations

import torch

from blip2_actor.models.kv_cache import ALIGNMENT, Attended, KVCache
from blip2_actor.transfer import to_device


class T5KVCache:
    """Two caches with the same slots: `own` for the decoder's tokens, `cross` for the encoded prefixes."""

    def __init__(self, own: KVCache, cross: KVCache) -> None:
        self.own = own
        self.cross = cross
        self.num_slots = own.num_slots
        # A slot that never held a text has one position of zeros: attention over no position is NaN.
        self.prefix_lengths = torch.ones(own.num_slots, dtype=torch.int64, device=own.kv.device)
        self._host_lengths = [1] * own.num_slots
        """A copy of `prefix_lengths` on the host, so that reading it does not wait for the device."""

    @property
    def max_length(self) -> int:
        return self.own.max_length

    @property
    def num_bytes(self) -> int:
        return self.own.num_bytes + self.cross.num_bytes

    def holds(self, prefix_length: int, max_new_tokens: int) -> bool:
        return self.own.holds(1, max_new_tokens) and self.cross.holds(prefix_length, 0)

    def grow(self, prefix_length: int, max_new_tokens: int) -> None:
        self.own.grow(1, max_new_tokens)
        self.cross.grow(prefix_length, 0)

    def set_prefix_lengths(self, slots: list[int], prefix_lengths: list[int]) -> None:
        for slot, length in zip(slots, prefix_lengths, strict=True):
            self._host_lengths[slot] = length
        device = self.prefix_lengths.device
        self.prefix_lengths[to_device(slots, device)] = to_device(prefix_lengths, device)

    def copy_slots(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy whole texts with their prefixes; sources and targets may overlap."""
        prefix_lengths = [self._host_lengths[slot] for slot in sources]
        self.own.copy_slots(sources, targets, length)
        self.cross.copy_slots(sources, targets, max(prefix_lengths))
        self.set_prefix_lengths(targets, prefix_lengths)

    def copy_positions(self, sources: list[int], targets: list[int], start: int, stop: int) -> None:
        """Copy positions [start, stop) of the texts' own tokens; their prefixes are equal already."""
        self.own.copy_positions(sources, targets, start, stop)

    @property
    def reads_counts(self) -> bool:
        return self.own.reads_counts

    def step_shape(self, num_rows: int) -> tuple[int, bool]:
        """Return the `kv_len` of the cross-attention over the first slots, and whether prefixes are unequal.

        Both follow from lengths on the host. If the prefixes are unequal, `kv_len` is rounded up, so that
        mixed prompts do not give every length a shape of its own. If attention reads the lengths from the
        device, there is one shape for all.
        """
        lengths = self._host_lengths[:num_rows]
        kv_len = max(lengths)
        if self.reads_counts:
            return self.cross.max_length, True
        if min(lengths) == kv_len:
            return kv_len, False
        return min(-(-kv_len // ALIGNMENT) * ALIGNMENT, self.cross.max_length), True

    def attended_prefixes(self, num_rows: int) -> Attended:
        """Return what the cross-attention of the first `num_rows` slots attends to: their whole prefixes."""
        kv_len, are_unequal = self.step_shape(num_rows)
        if not are_unequal:
            return Attended(kv_len, None, None)
        return self.cross.attended(self.prefix_lengths[:num_rows], kv_len)
