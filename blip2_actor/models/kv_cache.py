"""Preallocated keys and values: one slot per running text, each with its own length.

Running texts always occupy the first slots, without holes, so that a decode step works on views and
can be replayed as a graph. Nothing here knows which text is where; the scheduler does.
"""

from __future__ import annotations

import mmap
from functools import cache
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from blip2_actor.transfer import to_device

GROWTH = 64
"""Slots grow by this many positions at a time."""

COPY_BYTES = 64 << 20
"""Of what passes between slots at a time, unless one layer is more: a copy of all may not fit."""

ALIGNMENT = 8
"""Rows of masks and biases begin at multiples of this, else CUDA's attention copies them in every layer
(`aten/native/transformers/attention.cpp`, `pad_bias`)."""


class KVCache:
    """Keys and values of every layer, float[layers, S, L, 2 D]: of each position its key, then its value; the
    heads lie side by side in D.

    Position-major rows make the write of one step a single row copy per slot. On a CPU they are float32
    whatever the model computes in: torch's attention with one query takes 0.4 of the time it takes in
    bfloat16 (64 slots, 12 heads, 50 positions, one AVX512-BF16 core, 2026-11-23), and rounds less.
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
        """
        Args:
            width: D.
            dtype: of the model.
        """
        dtype = torch.float32 if device.type == "cpu" else dtype
        self.kv = _zeros((num_layers, num_slots, max_length, 2 * width), device, dtype)
        self.num_slots = num_slots
        self.max_length = max_length

    @property
    def num_bytes(self) -> int:
        return self.kv.nbytes

    def row_indices(self, positions: Tensor) -> Tensor:
        """Where the next key of slots 0..R-1 goes, as rows of float[S * L, D].

        int64[R] -> int64[R].
        """
        count = positions.shape[0]
        return aligned_arange(count, positions.device)[:count] * self.max_length + positions

    def write_step(self, layer: int, rows: Tensor, kv: Tensor) -> None:
        """Store a new position per running slot: `rows` from `row_indices`, keys and values float[R, 2 D]."""
        self.kv[layer].view(-1, kv.shape[-1]).index_copy_(0, rows, kv.to(self.kv.dtype))

    def write_prefix(self, layer: int, slots: Tensor, kv: Tensor) -> None:
        """Store the first positions of some slots: slots int64[n], keys and values float[n, T, 2 D]."""
        self.kv[layer][slots, : kv.shape[1]] = kv.to(self.kv.dtype)

    def attend(
        self,
        layer: int,
        query: Tensor,
        kv_len: int,
        num_heads: int,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Let one query per slot look at what its slot holds.

        Args:
            query: float[R, D], of slots 0..R-1.
            reach: positions to look at.
            mask: float[R, 1 or H, 1, reach], added to the scores: -inf behind a slot's own length.
            scale: of the scores; None is E ** -0.5.

        Returns:
            float[R, D], in the dtype of `query`.
        """
        kv = self.kv[layer, : query.shape[0], :kv_len]
        keys, values = kv.unflatten(-1, (2 * num_heads, -1)).transpose(1, 2).chunk(2, dim=1)
        heads = query.to(keys.dtype).unflatten(-1, (num_heads, 1, -1))
        mask = None if mask is None else mask.to(keys.dtype)
        context = F.scaled_dot_product_attention(heads, keys, values, attn_mask=mask, scale=scale)
        return context.flatten(1).to(query.dtype)

    def step_shape(self, num_rows: int) -> None:
        """Nothing else shapes a step."""

    def holds(self, prefix_length: int, max_new_tokens: int) -> bool:
        return prefix_length + max_new_tokens <= self.max_length

    def grow(self, prefix_length: int, max_new_tokens: int) -> None:
        """Lengthen every slot, in steps, so that growth is rare."""
        length = max(self.max_length, -(-(prefix_length + max_new_tokens) // GROWTH) * GROWTH)
        self.kv = F.pad(self.kv, (0, 0, 0, length - self.max_length))
        self.max_length = length

    def copy_slots(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy whole texts into other slots; overlapping sources and targets are safe."""
        self.copy_positions(sources, targets, 0, length)

    def copy_positions(self, sources: list[int], targets: list[int], start: int, stop: int) -> None:
        """Copy positions [start, stop) between slots; overlapping sources and targets are safe."""
        source, target = (to_device(slots, self.kv.device) for slots in (sources, targets))
        kv = self.kv
        if kv.device.type == "cuda" and kv.shape[-1] * kv.itemsize % 16 == 0:
            kv = kv.view(torch.complex128)  # CUDA moves one element a thread: let it be 16 bytes
        layer_bytes = kv[0, :1, start:stop].nbytes * len(sources)
        for layers in kv.split(max(1, COPY_BYTES // max(1, layer_bytes))):
            layers[:, target, start:stop] = layers[:, source, start:stop]


@cache
def aligned_arange(length: int, device: torch.device) -> Tensor:
    """0, 1, 2, … up to at least `length`, in a multiple of `ALIGNMENT`; made once, do not change it."""
    with torch.inference_mode(False):  # training may use it too
        return torch.arange(-(-length // ALIGNMENT) * ALIGNMENT, device=device)


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros; on a CPU in pages that come into memory when they are first written, so free slots cost none.

    Slots are many for the day when all are taken: of a 2.7 B model, 128 are 5 GB, and two texts need 0.1.
    """
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    pages = mmap.mmap(-1, prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
