"""The KV cache: preallocated keys and values, one slot per running text, each slot with its own length.

Running texts always occupy the first slots, without gaps, so that a decode step works on views and can be
captured as a CUDA graph. The cache does not know which text is in which slot; the scheduler does.

Axis letters: `blip2.py`.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from blip2_actor.device import find_kernel
from blip2_actor.transfer import to_device

GROWTH = 64
"""Slots grow by this number of positions at a time."""

COPY_BYTES = 64 << 20
"""Maximum size of one copy between slots, unless one layer alone is larger. A copy of all layers at once
might not fit into memory."""

ALIGNMENT = 8
"""Rows of masks and biases begin at multiples of this number of elements. Otherwise CUDA's attention copies
them in every layer (`aten/native/transformers/attention.cpp`, `pad_bias`)."""


@dataclass(frozen=True)
class Attended:
    """The positions to which the queries of a decode step attend, in every layer."""

    kv_len: int
    """Number of positions, from the first one; at least the greatest of `counts`."""
    counts: Tensor | None
    """int64[R], the number of positions of each slot; None if `mask` says it, or if it is `kv_len`."""
    mask: Tensor | None
    """float[R, 1 or H, 1, kv_len], added to the scores. Without `counts`, -inf beyond a slot's positions."""


class KVCache:
    """Keys and values of every layer: float[layers, slots, L, 2 D].

    Each position holds its key, then its value; the heads lie next to each other in D. Because positions
    are the rows, writing one decode step is a single row copy per slot.

    On a CPU the cache is float32, whatever the dtype of the model. torch's attention with one query then
    takes 0.4 of the time that it takes in bfloat16 (64 slots, 12 heads, 50 positions, one AVX512-BF16 core,
    2026-11-23), and rounds less.
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
            max_length: positions of one slot, L.
            width: D.
            dtype: of the model.
        """
        dtype = torch.float32 if device.type == "cpu" else dtype
        self.kv = _zeros((num_layers, num_slots, max_length, 2 * width), device, dtype)
        self.num_slots = num_slots
        self.max_length = max_length
        self._num_written = 0 if device.type == "cpu" else num_slots
        """On a CPU, the slots up to the last one that has held a text; the others have no memory yet."""
        self._kernel = _find_kernel(device, dtype)

    @property
    def num_bytes(self) -> int:
        return self.kv.nbytes

    @property
    def reads_counts(self) -> bool:
        """True if attention reads the number of positions of each slot from the device, so that the shapes
        of a decode step do not depend on it."""
        return self._kernel is not None

    def row_indices(self, positions: Tensor) -> Tensor:
        """Return the rows of float[slots * L, 2 D] for the next position of slots 0..R-1.

        int64[R] -> int64[R].
        """
        count = positions.shape[0]
        return aligned_arange(count, positions.device)[:count] * self.max_length + positions

    def write_step(self, layer: int, rows: Tensor, kv: Tensor) -> None:
        """Write one new position per running slot.

        Args:
            layer: index of the layer.
            rows: int64[R], from `row_indices`.
            kv: float[R, 2 D].
        """
        target, source = _wide(self.kv[layer].view(-1, kv.shape[-1]), kv.to(self.kv.dtype))
        target.index_copy_(0, rows, source)

    def write_prefix(self, layer: int, slots: Tensor, kv: Tensor) -> None:
        """Write the first T positions of some slots.

        Args:
            layer: index of the layer.
            slots: int64[N].
            kv: float[N, T, 2 D].
        """
        if self._num_written < self.num_slots:
            self._num_written = max(self._num_written, int(slots.max()) + 1)
        target, source = _wide(self.kv[layer], kv.to(self.kv.dtype))
        target[slots, : kv.shape[1]] = source

    def attended(self, counts: Tensor, kv_len: int, bias: Tensor | None = None) -> Attended:
        """Say once, for all layers, to which positions the queries of slots 0..R-1 attend.

        Args:
            counts: int64[R], the number of positions of each slot, from the first one; at least 1.
            kv_len: at least the greatest of `counts`.
            bias: float[R, H, 1, kv_len], added to the scores; -inf beyond `counts`. None adds nothing.
        """
        if self.reads_counts:
            return Attended(kv_len, counts, bias)
        if bias is not None:
            return Attended(kv_len, None, bias)
        outside = aligned_arange(kv_len, counts.device) >= counts[:, None]
        mask = torch.zeros(outside.shape, dtype=self.kv.dtype, device=counts.device)
        return Attended(kv_len, None, mask.masked_fill_(outside, float("-inf"))[:, None, None, :kv_len])

    def attend(
        self,
        layer: int,
        query: Tensor,
        attended: Attended,
        num_heads: int,
        scale: float | None = None,
    ) -> Tensor:
        """Compute the attention of one query per slot over the positions in its slot.

        Args:
            layer: index of the layer.
            query: float[R, D], of slots 0..R-1.
            attended: to which positions, from this cache's `attended`.
            num_heads: H.
            scale: factor of the scores; None is E ** -0.5.

        Returns:
            float[R, D], in the dtype of `query`.
        """
        mask = attended.mask
        if self._kernel is not None and attended.counts is not None:
            return self._kernel(query, self.kv[layer], attended.counts, mask, num_heads, scale)
        kv = self.kv[layer, : query.shape[0], : attended.kv_len]
        keys, values = kv.unflatten(-1, (2 * num_heads, -1)).transpose(1, 2).chunk(2, dim=1)
        heads = query.to(keys.dtype).unflatten(-1, (num_heads, 1, -1))
        mask = None if mask is None else mask.to(keys.dtype)
        context = F.scaled_dot_product_attention(heads, keys, values, attn_mask=mask, scale=scale)
        return context.flatten(1).to(query.dtype)

    def step_shape(self, num_rows: int) -> None:
        """Return None: the number of rows and `kv_len` already fix the shapes of a decode step."""

    def holds(self, prefix_length: int, max_new_tokens: int) -> bool:
        return prefix_length + max_new_tokens <= self.max_length

    def grow(self, prefix_length: int, max_new_tokens: int) -> None:
        """Lengthen every slot to a multiple of `GROWTH`, so that growing is rare."""
        if self.holds(prefix_length, max_new_tokens):
            return
        length = -(-(prefix_length + max_new_tokens) // GROWTH) * GROWTH
        num_layers, num_slots, old_length, width = self.kv.shape
        grown = _zeros((num_layers, num_slots, length, width), self.kv.device, self.kv.dtype)
        grown[:, : self._num_written, :old_length] = self.kv[:, : self._num_written]
        self.kv, self.max_length = grown, length

    def copy_slots(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy the first `length` positions into other slots; sources and targets may overlap."""
        self.copy_positions(sources, targets, 0, length)

    def copy_positions(self, sources: list[int], targets: list[int], start: int, stop: int) -> None:
        """Copy positions [start, stop) between slots; sources and targets may overlap."""
        self._num_written = max(self._num_written, 1 + max(targets, default=-1))
        if self.kv.device.type == "cpu" and not set(sources) & set(targets):
            # One by one: four slots of 12 layers take a seventh of the time that they take by indices.
            for from_slot, to_slot in zip(sources, targets, strict=True):
                self.kv[:, to_slot, start:stop] = self.kv[:, from_slot, start:stop]
            return
        source, target = (to_device(slots, self.kv.device) for slots in (sources, targets))
        (kv,) = _wide(self.kv)
        layer_bytes = kv[0, :1, start:stop].nbytes * len(sources)
        for layers in kv.split(max(1, COPY_BYTES // max(1, layer_bytes))):
            layers[:, target, start:stop] = layers[:, source, start:stop]


def aligned_arange(length: int, device: torch.device) -> Tensor:
    """Return 0, 1, 2, … in int64[N], where N is `length` rounded up to a multiple of `ALIGNMENT`.

    It is a view of a tensor that is made once and shared. Do not modify it.
    """
    aligned = -(-length // ALIGNMENT) * ALIGNMENT
    return _arange(1 << (aligned - 1).bit_length(), device)[:aligned]


@cache
def _arange(length: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the tensor may also be used in training
        numbers = torch.arange(length, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # another engine's stream may read it next
    return numbers


Kernel = Callable[[Tensor, Tensor, Tensor, "Tensor | None", int, "float | None"], Tensor]
"""`decode_attention`."""


@cache
def _find_kernel(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    def load() -> Kernel:
        from blip2_actor.models.decode_attention import decode_attention

        one = torch.ones(1, 16, device=device, dtype=dtype)
        decode_attention(one, one.repeat(1, 1, 2), one[0, :1].long(), None, 1, None)
        return decode_attention

    return find_kernel(device, "Attention of decode steps", load)


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """View tensors in elements of 16 bytes if all can be, on a GPU, which copies one element per thread."""
    can_be = all(
        tensor.device.type == "cuda"
        and not any(
            count * tensor.itemsize % 16
            for count in (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1])
        )
        for tensor in tensors
    )
    return tuple(tensor.view(torch.complex128) for tensor in tensors) if can_be else tensors


def _zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return zeros. On a CPU, memory is only taken when it is written, so that free slots cost none.

    There are enough slots for the busiest moment: 128 slots of a 2.7 B model are 5 GB, while two texts need
    0.1 GB.
    """
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    num_bytes = prod(shape) * dtype.itemsize
    try:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:  # ENOMEM, where a limit of the system refuses memory
        raise MemoryError(f"{num_bytes:,} bytes for the slots: {error}") from None
    return torch.frombuffer(pages, dtype=dtype).view(shape)
