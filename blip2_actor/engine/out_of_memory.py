"""Work that runs out of memory: notice it, and do less at once from then on.

The error has a traceback that keeps the tensors of the failed work alive. So it is caught where the work
ends, and only its text is kept (`OutOfMemory`). What the scheduler then does is in `memory_recovery`.
"""

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
    """Memory did not suffice. Unlike the error, this keeps none of the tensors of the failed work."""

    reason: str


def catch_out_of_memory(work: Callable[[], ResultT]) -> ResultT | OutOfMemory:
    """Return the result of `work`, or `OutOfMemory`; in that case the memory it held is free again."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return OutOfMemory(str(error) or type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory does not suffice.

    On a CPU torch has no exception class for it. It is raised if a limit of the system (`ulimit -v`) refuses
    memory.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


class Limits:
    """How much the scheduler gives the device at once. A limit is halved, for good, if memory does not
    suffice."""

    def __init__(self, max_slots: int, encode_batch: int) -> None:
        self.max_slots = max_slots
        """Texts decoded at once."""
        self.encode_batch = encode_batch
        """Images per pass of the encoders."""
        self.prefill_batch = max_slots
        """Requests per prefill."""

    def halve_encode_batch(self) -> bool:
        """Return False if it is one image already."""
        if self.encode_batch == 1:
            return False
        self.encode_batch //= 2
        logger.warning("Out of memory: from now on %d images are encoded at once", self.encode_batch)
        return True

    def halve_prefill_batch(self, num_requests: int) -> bool:
        """Allow half of a prefill that did not fit; return False if it was one request."""
        if num_requests == 1:
            return False
        self.prefill_batch = num_requests // 2
        logger.warning("Out of memory: from now on %d prompts are read at once", self.prefill_batch)
        return True

    def halve_slots(self) -> bool:
        """Return False if there is only one slot."""
        if self.max_slots == 1:
            return False
        self.max_slots //= 2
        self.prefill_batch = self.max_slots  # a prefill may have failed because the slots had to grow
        logger.warning("Out of memory: from now on %d texts are decoded at once", self.max_slots)
        return True


class ShrinkingBatches:
    """Work in batches. Their size is halved, for good, if memory does not suffice."""

    def __init__(self, size: int, what: str) -> None:
        """
        Args:
            size: number of items in the first batches.
            what: name of the items in the plural, for the log.
        """
        self.size = size
        self.what = what

    def run(self, work: Callable[[list[ItemT]], list[ResultT]], items: list[ItemT]) -> list[ResultT]:
        """Return one result per item, in order.

        Args:
            work: takes a batch of items and returns one result per item.

        Raises:
            RuntimeError, MemoryError: `is_out_of_memory`, because one item alone does not fit; or as from
                `work`.
        """
        results: list[ResultT] = []
        while len(results) < len(items):
            try:
                results += work(items[len(results) : len(results) + self.size])
            except (RuntimeError, MemoryError) as error:
                if self.size == 1 or not is_out_of_memory(error):
                    raise
                self.size //= 2
                logger.warning("Out of memory: from now on %d %s are processed at once", self.size, self.what)
        return results
