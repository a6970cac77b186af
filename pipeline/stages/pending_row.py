"""`PendingRow`: a row between its requests to the engine and its result."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

from blip2_actor import ImageLike, Result
from pipeline.endpoint.waiting import GivenUp
from pipeline.stages.engine_fault import EngineFault

Pending = Future[Result] | Result
"""A result that is there, or that will be."""


@dataclass(slots=True)
class PendingRow:
    """A row of which texts have been requested."""

    position: int
    """Its position in the table."""
    pending: list[Pending]
    """The caption, if one is made, followed by the answers in the order of the asks."""
    prompt: str | None = None
    image: ImageLike | None = None
    """Kept if more is made of it when the texts are there."""
    image_key: bytes = b""
    """Equal for identical images, if the results of identical images are reused."""
    results: list[Result] = field(default_factory=list)
    """The results of the requests, once they are done."""

    def collect(self) -> None:
        """Take over the results of the requests; waits for them.

        Raises:
            EngineFault: the engine has failed.
            GivenUp: the job stops, and its endpoint was not waited for.
        """
        self.results = [_result(pending) for pending in self.pending]

    def cancel(self) -> None:
        """Cancel the requests that are still running."""
        for pending in self.pending:
            if isinstance(pending, Future):
                pending.cancel()


class Deadline:
    """A point in time, or never."""

    def __init__(self, after_s: float | None) -> None:
        """Set the deadline to a number of seconds from now; None means never."""
        self._at = None if after_s is None else time.monotonic() + after_s

    @property
    def left_s(self) -> float | None:
        """Seconds left, at least 0; None for never."""
        return None if self._at is None else max(0.0, self._at - time.monotonic())


def are_done(pending: Sequence[Pending], deadline: Deadline) -> bool:
    """Wait for results and return True, or return False when the deadline has passed.

    Returns False after the deadline even if all results are there: otherwise a steady stream of results would
    never be handed on.
    """
    for one in pending:
        left_s = deadline.left_s
        if left_s == 0:
            return False
        is_done = isinstance(one, Result) or one.done() or wait([one], left_s).done
        if not is_done:
            return False
    return True


def _result(pending: Pending) -> Result:
    if isinstance(pending, Result):
        return pending
    error = pending.exception()
    if isinstance(error, GivenUp):
        raise error
    if error is not None:
        raise EngineFault.of(error) from error
    return pending.result()
