"""What T5 remembers of each running text: its own tokens, and the prefix that its decoder looks at."""

from __future__ import annotations

import torch
from torch import Tensor

from blip2_actor.models.kv_cache import ALIGNMENT, KVCache, aligned_arange
from blip2_actor.transfer import to_device


class T5KVCache:
    """Keys and values of each running text: its own tokens (`own`) and its encoded prefix (`cross`)."""

    def __init__(self, own: KVCache, cross: KVCache) -> None:
        self.own = own
        self.cross = cross
        self.num_slots = own.num_slots
        # A slot that never had a text shows one position of zeros: to look at none gives no number at all.
        self.prefix_lengths = torch.ones(own.num_slots, dtype=torch.int64, device=own.kv.device)
        self._host_lengths = [1] * own.num_slots
        """`prefix_lengths`, known without asking the device."""

    @property
    def max_length(self) -> int:
        return self.own.max_length

    @property
    def num_bytes(self) -> int:
        return self.own.num_bytes + self.cross.num_bytes

    def holds(self, prefix_length: int, max_new_tokens: int) -> bool:
        return self.own.holds(1, max_new_tokens) and self.cross.holds(prefix_length, 0)

    def grow(self, prefix_length: int, max_new_tokens: int) -> None:
        if not self.own.holds(1, max_new_tokens):
            self.own.grow(1, max_new_tokens)
        if not self.cross.holds(prefix_length, 0):
            self.cross.grow(prefix_length, 0)

    def occupy(self, slots: list[int], prefix_lengths: list[int]) -> None:
        """Note how long the prefixes in `slots` are."""
        for slot, length in zip(slots, prefix_lengths, strict=True):
            self._host_lengths[slot] = length
        device = self.prefix_lengths.device
        self.prefix_lengths[to_device(slots, device)] = to_device(prefix_lengths, device)

    def copy_slots(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy whole texts, prefixes too; overlapping sources and targets are safe."""
        prefix_lengths = [self._host_lengths[slot] for slot in sources]
        self.own.copy_slots(sources, targets, length)
        self.cross.copy_slots(sources, targets, max(prefix_lengths))
        self.occupy(targets, prefix_lengths)

    def copy_positions(self, sources: list[int], targets: list[int], start: int, stop: int) -> None:
        """Copy the texts' own positions [start, stop); slots of one image share their prefix already."""
        self.own.copy_positions(sources, targets, start, stop)

    def step_shape(self, num_rows: int) -> tuple[int, bool]:
        """How far the cross-attention of the first R slots reaches, and whether some see less than others.

        Both follow from lengths that the host knows. Unequal prefixes round their reach up, so that mixed
        prompts do not make a shape of every length.
        """
        lengths = self._host_lengths[:num_rows]
        kv_len = max(lengths)
        if min(lengths) == kv_len:
            return kv_len, False
        return min(-(-kv_len // ALIGNMENT) * ALIGNMENT, self.cross.max_length), True

    def prefix_mask(self, num_rows: int) -> tuple[int, Tensor | None]:
        """What the cross-attention of the first R slots looks at, and what it adds to the scores.

        Returns:
            The reach, P; and float[R, 1, 1, P], -inf behind each slot's own prefix, or None where all are
            equally long.
        """
        kv_len, is_masked = self.step_shape(num_rows)
        if not is_masked:
            return kv_len, None
        outside = aligned_arange(kv_len, self.prefix_lengths.device) >= self.prefix_lengths[:num_rows, None]
        mask = torch.zeros(outside.shape, dtype=self.own.kv.dtype, device=outside.device)
        return kv_len, mask.masked_fill_(outside, float("-inf"))[:, None, None, :kv_len]
