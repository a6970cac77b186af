"""Preallocated keys and values: one slot per running text, each with its own length.

Running texts always occupy the first slots, without holes, so that a decode step works on views and
can be replayed as a graph. Nothing here knows which text is where; the scheduler does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

GROWTH = 64
"""Slots grow by this many positions at a time."""


class SlotCache:
    """Keys and values of every layer, float[layers, S, L, D]; the heads lie side by side in D.

    Position-major rows make the write of one step a single row copy per slot.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        max_length: int,
        width: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (num_layers, num_slots, max_length, width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.num_slots = num_slots
        self.max_length = max_length

    @staticmethod
    def bytes_per_slot(num_layers: int, max_length: int, width: int, dtype: torch.dtype) -> int:
        return 2 * num_layers * max_length * width * dtype.itemsize

    def row_indices(self, positions: Tensor) -> Tensor:
        """Where the next key of slots 0..R-1 goes, as rows of float[S * L, D].

        int64[R] -> int64[R].
        """
        return torch.arange(positions.shape[0], device=positions.device) * self.max_length + positions

    def write_step(self, layer: int, rows: Tensor, key: Tensor, value: Tensor) -> None:
        """Store one new position per running slot; `rows` from `row_indices`, key and value float[R, D]."""
        self.keys[layer].view(-1, key.shape[-1]).index_copy_(0, rows, key)
        self.values[layer].view(-1, value.shape[-1]).index_copy_(0, rows, value)

    def write_prefix(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store the first positions of some slots: slots int64[n], key and value float[n, T, D]."""
        self.keys[layer][slots, : key.shape[1]] = key
        self.values[layer][slots, : value.shape[1]] = value

    def read(self, layer: int, num_rows: int, length: int, num_heads: int) -> tuple[Tensor, Tensor]:
        """Views of the first slots: two float[R, H, length, E]."""
        return (
            self.keys[layer, :num_rows, :length].unflatten(-1, (num_heads, -1)).transpose(1, 2),
            self.values[layer, :num_rows, :length].unflatten(-1, (num_heads, -1)).transpose(1, 2),
        )

    def holds(self, prefix_length: int, max_new_tokens: int) -> bool:
        return prefix_length + max_new_tokens <= self.max_length

    def grow(self, prefix_length: int, max_new_tokens: int) -> None:
        """Lengthen every slot, in steps, so that growth is rare."""
        length = -(-(prefix_length + max_new_tokens) // GROWTH) * GROWTH
        self.keys = F.pad(self.keys, (0, 0, 0, length - self.max_length))
        self.values = F.pad(self.values, (0, 0, 0, length - self.max_length))
        self.max_length = length

    def shrink(self, num_slots: int) -> None:
        self.keys, self.values = self.keys[:, :num_slots].clone(), self.values[:, :num_slots].clone()
        self.num_slots = num_slots

    def fork(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy whole texts into other slots; overlapping sources and targets are safe."""
        self.reorder(sources, targets, 0, length)

    def reorder(self, sources: list[int], targets: list[int], start: int, stop: int) -> None:
        """Copy positions [start, stop) between slots; overlapping sources and targets are safe."""
        for states in (self.keys, self.values):
            states[:, targets, start:stop] = states[:, sources, start:stop]
