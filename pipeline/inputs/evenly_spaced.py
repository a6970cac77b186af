"""Choose a few items from all over a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def evenly_spaced(items: Sequence[T], max_items: int) -> list[T]:
    """Return at most `max_items` of the items, in order and at equal distances."""
    num_chosen = min(len(items), max_items)
    return [items[number * len(items) // num_chosen] for number in range(num_chosen)]
