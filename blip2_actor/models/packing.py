"""Sequences of different lengths in one tensor, without padding.

Sequences are sorted by length and laid one behind the other, float[T_total, D]; those of equal length
form a group, which is a plain view float[n, T, D], so that attention runs once per length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from blip2_actor.models.layers import attend, merge_heads, split_heads
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
        """Plan the layout.

        Args:
            lengths: of each sequence.
            device: where the sequences are.
            keys: sequences of equal key form a group (and must be of equal length); None groups by length.
                Two packings with the same keys have their groups side by side.
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
        for place, original in enumerate(self.order):
            restore[original] = place
        self.restore_order = to_device(restore, device)

    def pack(self, sequences: list[Tensor]) -> Tensor:
        """Lay sequences float[T_i, D] one behind the other, sorted: float[T_total, D]."""
        return torch.cat([sequences[i] for i in self.order])

    def slots_by_group(self, slots: list[int]) -> list[Tensor]:
        """The slots of each group's sequences: int64[count] each."""
        ordered = [slots[i] for i in self.order]
        found = []
        for group in self.groups:
            found.append(to_device(ordered[: group.count], self.device))
            ordered = ordered[group.count :]
        return found

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """The sequences in their first order: [T_total, ...] -> [T_i, ...] each, views."""
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
    ) -> Tensor:
        """Attention within each sequence.

        Args:
            query: float[T_total, D].
            kv: float[T_total, 2 D], keys and values.
            num_heads: H.
            is_causal: each position sees itself and what is before it.
            bias: float[H, T, T] for the longest T, added to the scores.
            scale: of the scores; None is E ** -0.5.

        Returns:
            float[T_total, D].
        """
        contexts = []
        for group in self.groups:
            q, k, v = split_heads(group.view(query), num_heads), *_keys_values(group.view(kv), num_heads)
            # Four axes: with three, the CPU's fused kernel steps aside.
            mask = None if bias is None else bias[None, :, : group.length, : group.length]
            context = attend(q, k, v, mask=mask, is_causal=is_causal, scale=scale)
            contexts.append(merge_heads(context).flatten(0, 1))
        return contexts[0] if len(contexts) == 1 else torch.cat(contexts)

    def attend_across(
        self,
        other: Packing,
        query: Tensor,
        kv: Tensor,
        num_heads: int,
        scale: float | None = None,
    ) -> Tensor:
        """Attention of each sequence over all positions of its counterpart in `other`, of the same keys.

        float[T_total, D] and float[other.T_total, 2 D] -> float[T_total, D].
        """
        contexts = []
        for group, seen in zip(self.groups, other.groups, strict=True):
            q = split_heads(group.view(query), num_heads)
            context = attend(q, *_keys_values(seen.view(kv), num_heads), scale=scale)
            contexts.append(merge_heads(context).flatten(0, 1))
        return contexts[0] if len(contexts) == 1 else torch.cat(contexts)

    def attend_last(self, query: Tensor, kv: Tensor, num_heads: int) -> Tensor:
        """Causal attention of each sequence's last position.

        float[T_total, D] and float[T_total, 2 D] -> float[n, D].
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
