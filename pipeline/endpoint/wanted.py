"""`Wanted`: an output requested for an image, from its submission to its outcome."""

from __future__ import annotations

import time
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.endpoint.batch_requests import Ask, Outcome

MAX_BREAKS = 3
"""A text is sent alone after this many answers that broke off or timed out, or as soon as it is refused
together with others. After as many answers alone, it fails."""


@dataclass(eq=False)
class Wanted:
    """An output requested for an image. Its future ends once: the first thread to end it counts."""

    image: np.ndarray
    ask: Ask
    future: Future[Any] = field(default_factory=Future)
    num_breaks: int = 0
    since_s: float = field(default_factory=time.monotonic)

    def goes_with(self, other: Wanted) -> bool:
        """Return whether both may stand in one request."""
        return self.ask.goes_with(other.ask) and max(self.num_breaks, other.num_breaks) < MAX_BREAKS

    def resolve(self, outcome: Outcome) -> None:
        with suppress(InvalidStateError):
            self.future.set_result(outcome)

    def fail(self, error: Exception) -> None:
        with suppress(InvalidStateError):
            self.future.set_exception(error)
