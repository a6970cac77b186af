"""`PendingRow`: a row between its requests to the engine and its result."""

from __future__ import annotations

import time
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

from blip2_actor import ImageLike, Result
from pipeline.endpoint.waiting import GivenUp
from pipeline.stages.engine_fault import EngineFault

Pending = Future[Result] | Result
"""A result, or the future of one."""


@dataclass(slots=True)
class PendingRow:
    """A row whose texts have been requested."""

    position: int
    """Its position in the table."""
    pending: list[Pending]
    """The caption, if one is made, followed by the answers in the order of the asks."""
    prompt: str | None = None
    image: ImageLike | None = None
    """Kept if more outputs are made of it after the texts."""
    image_key: bytes = b""
    """Equal for identical images, if the results of identical images are reused."""
    results: list[Result] = field(default_factory=list)
    """The results of the requests, once they are done."""

    def collect(self) -> None:
        """Take over the results of the requests; waits for them.

        Raises:
            EngineFault: the engine has failed.
            GivenUp: the job stops without waiting for its endpoint.
        """
        self.results = [_result(pending) for pending in self.pending]

    def is_done_by(self, due: float) -> bool:
        """Wait for the results and return True, or return False when a monotonic clock has reached `due`.

        Returns False then even if all results are there: otherwise a steady stream of results would never be
        handed on.
        """
        for pending in self.pending:
            left_s = due - time.monotonic()
            if left_s <= 0:
                return False
            if isinstance(pending, Future) and not (pending.done() or wait([pending], left_s).done):
                return False
        return True

    def cancel(self) -> None:
        """Cancel the requests that are still running."""
        for pending in self.pending:
            if isinstance(pending, Future):
                pending.cancel()


def _result(pending: Pending) -> Result:
    if isinstance(pending, Result):
        return pending
    error = pending.exception()
    if isinstance(error, GivenUp):
        raise error
    if error is not None:
        raise EngineFault.of(error) from error
    return pending.result()
