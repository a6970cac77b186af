"""Sequences of different lengths in one tensor, without padding.

Sequences are sorted by length and packed one after the other, float[T_total, D]. Those of equal length form
a group, which is a plain view float[N, T, D], so that attention runs once per length.

Axis letters: `blip2.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

from blip2_actor.models.layers import attend, merge_heads, split_heads
from blip2_actor.models.recorder import NO_RECORDER, Recorder
from blip2_actor.transfer import to_device


@dataclass(frozen=True)
class Group:
    """Sequences of one length: rows [start, start + count * length) of the packed tensor."""

    start: int
    count: int
    length: int

    def view(self, packed: Tensor) -> Tensor:
        """[T_total, D] -> [count, length, D]."""
        stop = self.start + self.count * self.length
        return packed[self.start : stop].unflatten(0, (self.count, self.length))


class Packing:
    """The layout of one batch of sequences."""

    def __init__(
        self, lengths: list[int], device: torch.device, keys: Sequence[int | tuple[int, ...]] | None = None
    ) -> None:
        """
        Args:
            lengths: length of each sequence.
            device: of the sequences.
            keys: sequences with equal keys form a group and must have equal lengths; None groups by length.
                Two packings with the same keys have corresponding groups.
        """
        self.device = device
        keys = lengths if keys is None else keys
        self.order = sorted(range(len(lengths)), key=keys.__getitem__)
        self.groups: list[Group] = []
        start = 0
        for _, members in groupby(self.order, key=keys.__getitem__):
            indices = list(members)
            group = Group(start, len(indices), lengths[indices[0]])
            self.groups.append(group)
            start += group.count * group.length
        self._packed_lengths = [lengths[i] for i in self.order]
        self._packed_index = sorted(range(len(lengths)), key=self.order.__getitem__)
        """Where each sequence is among the packed ones."""

    @property
    def positions(self) -> Tensor:
        """Position of each element in its sequence: int64[T_total]."""
        return torch.cat([torch.arange(g.length, device=self.device).repeat(g.count) for g in self.groups])

    @property
    def last(self) -> Tensor:
        """Rows of the last elements of the sequences, in packed order: int64[N]."""
        return to_device([end - 1 for end in accumulate(self._packed_lengths)], self.device)

    @property
    def restore_order(self) -> Tensor:
        """Indices that bring one row for each packed sequence into the original order: int64[N]."""
        return to_device(self._packed_index, self.device)

    def pack(self, sequences: list[Tensor]) -> Tensor:
        """Pack sequences one after the other, in sorted order: float[T_i, D] each -> float[T_total, D]."""
        return torch.cat([sequences[i] for i in self.order])

    def slots_by_group(self, slots: list[int]) -> list[Tensor]:
        """Return the slots of each group's sequences: int64[count] per group.

        Args:
            slots: one per sequence, in the original order.
        """
        ordered = to_device([slots[i] for i in self.order], self.device)
        return list(ordered.split([group.count for group in self.groups]))

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """Return views of the sequences in their original order: [T_total, ...] -> [T_i, ...] each."""
        parts = packed.split(self._packed_lengths)
        return [parts[i] for i in self._packed_index]

    def attend(
        self,
        query: Tensor,
        kv: Tensor,
        num_heads: int,
        *,
        over: Packing | None = None,
        is_causal: bool = False,
        bias: Tensor | None = None,
        scale: float | None = None,
        recorder: Recorder = NO_RECORDER,
        name: str = "",
    ) -> Tensor:
        """Compute attention within each sequence, or over its counterpart in another packing.

        Args:
            query: float[T_total, D].
            kv: float[T_total of `over`, 2 D], keys and values.
            num_heads: H.
            over: a packing with the same keys, whose sequences are read whole; None is this one.
            is_causal: each position attends to itself and to those before it.
            bias: float[H, T, T] for the longest T, added to the scores.
            scale: factor of the scores; None is E ** -0.5.
            recorder: takes the attention, if there is one sequence.
            name: of the layer for the recorder.

        Returns:
            float[T_total, D].
        """
        kind = "self_attention" if over is None else "cross_attention"
        contexts = []
        for group, kv_group in zip(self.groups, (over or self).groups, strict=True):
            q = split_heads(group.view(query), num_heads)
            k, v = split_heads(kv_group.view(kv), 2 * num_heads).chunk(2, dim=1)
            # Four axes: with three, the CPU's fused kernel is not used.
            mask = None if bias is None else bias[None, :, : group.length, : group.length]
            recorder.attention(f"{name}.{kind}", q, k, mask, is_causal, scale)
            context = attend(q, k, v, mask=mask, is_causal=is_causal, scale=scale)
            contexts.append(merge_heads(context).flatten(0, 1))
        return contexts[0] if len(contexts) == 1 else torch.cat(contexts)
