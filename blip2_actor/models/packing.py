"""Sequences of different lengths in one tensor, without padding.

Sequences are sorted by length and packed one after the other, float[T_total, D]. Those of equal length form
a group, which is a plain view float[N, T, D], so that attention runs once per length.

Axis letters: `blip2.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from blip2_actor.models.layers import attend, merge_heads, split_heads
from blip2_actor.models.recorder import Recorder
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
        self, lengths: list[int], device: torch.device, keys: Sequence[tuple[int, ...]] | None = None
    ) -> None:
        """
        Args:
            lengths: length of each sequence.
            device: of the sequences.
            keys: sequences with equal keys form a group and must have equal lengths; None groups by length.
                Two packings with the same keys have corresponding groups.
        """
        self.device = device
        keys = [(length,) for length in lengths] if keys is None else keys
        self.order = sorted(range(len(lengths)), key=keys.__getitem__)
        self.groups: list[Group] = []
        start = 0
        for _, members in groupby(self.order, key=keys.__getitem__):
            indices = list(members)
            group = Group(start, len(indices), lengths[indices[0]])
            self.groups.append(group)
            start += group.count * group.length
        self.positions = torch.cat(
            [torch.arange(g.length, device=device).repeat(g.count) for g in self.groups]
        )
        ends = [g.start + (i + 1) * g.length - 1 for g in self.groups for i in range(g.count)]
        self.last = to_device(ends, device)
        restore = [0] * len(lengths)
        for packed_index, original_index in enumerate(self.order):
            restore[original_index] = packed_index
        self.restore_order = to_device(restore, device)

    def pack(self, sequences: list[Tensor]) -> Tensor:
        """Pack sequences one after the other, in sorted order: float[T_i, D] each -> float[T_total, D]."""
        return torch.cat([sequences[i] for i in self.order])

    def slots_by_group(self, slots: list[int]) -> list[Tensor]:
        """Return the slots of each group's sequences: int64[count] per group.

        Args:
            slots: one per sequence, in the original order.
        """
        ordered = [slots[i] for i in self.order]
        groups = []
        for group in self.groups:
            groups.append(to_device(ordered[: group.count], self.device))
            ordered = ordered[group.count :]
        return groups

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """Return views of the sequences in their original order: [T_total, ...] -> [T_i, ...] each."""
        ordered = packed.split([g.length for g in self.groups for _ in range(g.count)])
        return [part for _, part in sorted(zip(self.order, ordered, strict=True), key=lambda pair: pair[0])]

    def attend(
        self,
        query: Tensor,
        kv: Tensor,
        num_heads: int,
        is_causal: bool = False,
        bias: Tensor | None = None,
        scale: float | None = None,
        recorder: Recorder | None = None,
        name: str = "",
    ) -> Tensor:
        """Compute attention within each sequence.

        Args:
            query: float[T_total, D].
            kv: float[T_total, 2 D], keys and values.
            num_heads: H.
            is_causal: each position attends to itself and to those before it.
            bias: float[H, T, T] for the longest T, added to the scores.
            scale: factor of the scores; None is E ** -0.5.
            recorder: takes the attention, if there is one sequence.
            name: of the layer for the recorder.

        Returns:
            float[T_total, D].
        """
        contexts = []
        for group in self.groups:
            q, k, v = split_heads(group.view(query), num_heads), *_keys_values(group.view(kv), num_heads)
            # Four axes: with three, the CPU's fused kernel is not used.
            mask = None if bias is None else bias[None, :, : group.length, : group.length]
            if recorder is not None:
                recorder.attention(f"{name}.self_attention", q, k, mask, is_causal, scale)
            context = attend(q, k, v, mask=mask, is_causal=is_causal, scale=scale)
            contexts.append(merge_heads(context).flatten(0, 1))
        return contexts[0] if len(contexts) == 1 else torch.cat(contexts)

    def attend_across(
        self,
        other: Packing,
        query: Tensor,
        kv: Tensor,
        num_heads: int,
        scale: float | None,
        recorder: Recorder | None,
        name: str,
    ) -> Tensor:
        """Compute attention of each sequence over all positions of its counterpart in another packing.

        Args:
            other: a packing with the same keys.
            query: float[T_total, D].
            kv: float[T_total of `other`, 2 D], keys and values.
            num_heads: H.
            scale: factor of the scores; None is E ** -0.5.
            recorder: takes the attention, if there is one sequence.
            name: of the layer for the recorder.

        Returns:
            float[T_total, D].
        """
        contexts = []
        for group, other_group in zip(self.groups, other.groups, strict=True):
            q = split_heads(group.view(query), num_heads)
            k, v = _keys_values(other_group.view(kv), num_heads)
            if recorder is not None:
                recorder.attention(f"{name}.cross_attention", q, k, scale=scale)
            context = attend(q, k, v, scale=scale)
            contexts.append(merge_heads(context).flatten(0, 1))
        return contexts[0] if len(contexts) == 1 else torch.cat(contexts)

    def attend_last(self, query: Tensor, kv: Tensor, num_heads: int) -> Tensor:
        """Compute causal attention of each sequence's last position only.

        float[T_total, D] and float[T_total, 2 D] -> float[N, D].
        """
        contexts = []
        for group in self.groups:
            q, k, v = split_heads(group.view(query), num_heads), *_keys_values(group.view(kv), num_heads)
            context = attend(q[:, :, -1:], k, v)
            contexts.append(merge_heads(context).flatten(1))
        return torch.cat(contexts)


def _keys_values(kv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """float[B, T, 2 D] -> two float[B, H, T, E]."""
    key, value = kv.chunk(2, dim=-1)
    return split_heads(key, num_heads), split_heads(value, num_heads)
