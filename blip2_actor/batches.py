"""Work in batches that fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
FoundT = TypeVar("FoundT")


class Batches:
    """Batches of a size that halves, for good, where memory does not suffice."""

    def __init__(self, size: int, what: str) -> None:
        """
        Args:
            size: items of the first batches.
            what: the items' name in the plural, for the log.
        """
        self.size = size
        self.what = what

    def run(self, work: Callable[[list[ItemT]], list[FoundT]], items: list[ItemT]) -> list[FoundT]:
        """One result per item, in order; `work` gives one per item of its batch.

        Raises:
            OutOfMemoryError: one item alone does not fit.
        """
        found: list[FoundT] = []
        while len(found) < len(items):
            try:
                found += work(items[len(found) : len(found) + self.size])
            except torch.OutOfMemoryError:
                if self.size == 1:
                    raise
                self.size //= 2
                logger.warning("Out of memory: %d %s at a time from now on", self.size, self.what)
        return found
