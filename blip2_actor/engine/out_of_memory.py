"""Work in batches that fit into memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class OutOfMemory:
    """Memory did not suffice, and why; unlike the error it keeps none of the failed work's tensors."""

    reason: str


def catch_out_of_memory(work: Callable[[], ResultT]) -> ResultT | OutOfMemory:
    """What `work` gives, or that it ran out of memory: by then what it held is free again."""
    try:
        return work()
    except torch.OutOfMemoryError as error:
        return OutOfMemory(str(error))


class ShrinkingBatches:
    """Batches of a size that halves, for good, where memory does not suffice."""

    def __init__(self, size: int, what: str) -> None:
        """
        Args:
            size: items of the first batches.
            what: the items' name in the plural, for the log.
        """
        self.size = size
        self.what = what

    def run(self, work: Callable[[list[ItemT]], list[ResultT]], items: list[ItemT]) -> list[ResultT]:
        """One result per item, in order; `work` gives one per item of its batch.

        Raises:
            OutOfMemoryError: one item alone does not fit.
        """
        found: list[ResultT] = []
        while len(found) < len(items):
            try:
                found += work(items[len(found) : len(found) + self.size])
            except torch.OutOfMemoryError:
                if self.size == 1:
                    raise
                self.size //= 2
                logger.warning("Out of memory: %d %s at a time from now on", self.size, self.what)
        return found
