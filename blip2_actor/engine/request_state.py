"""One request between `submit` and its result."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from math import isnan
from typing import Any

from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.generation.beam_search import BeamSearch
from blip2_actor.generation.search import TextSearch
from blip2_actor.options import GenerationOptions
from blip2_actor.request import Result
from blip2_actor.status import Status

logger = logging.getLogger(__name__)

NOT_FINITE = (
    "the model produced NaN or infinity; try --dtype float32, or with float32 fetch the checkpoint again"
)
"""Error of a row whose result is not a number."""

Searches = list[TextSearch | BeamSearch]


@dataclass(eq=False)
class RequestState:
    """A request and its progress. A request without searches only wants its image encoded."""

    image: EncodedImage
    prompt_ids: list[int] = field(default_factory=list)
    options: GenerationOptions = field(default_factory=GenerationOptions().resolve)
    make_searches: Callable[[], Searches] = list
    low_priority: bool = False
    future: Future[Result] = field(default_factory=Future)
    arrived_s: float = field(default_factory=time.monotonic)
    """When the caller handed it over, by the clock of `EncodeStage`."""
    searches: Searches = field(init=False)
    _caller_knows: bool = False
    """True once the future's waiters are told that it is cancelled."""

    def __post_init__(self) -> None:
        self.searches = self.make_searches()

    def restart(self) -> None:
        """Start again at the first token. A text keeps its tokens; a beam search starts over."""
        before, self.searches = self.searches, self.make_searches()
        for search, old in zip(self.searches, before, strict=True):
            if isinstance(search, TextSearch) and isinstance(old, TextSearch):
                search.repeat(old)

    @property
    def num_slots(self) -> int:
        return sum(search.num_slots for search in self.searches)

    def is_dropped(self) -> bool:
        """Return True if the caller has cancelled the request; then tell those who wait for the future."""
        if not self.future.cancelled():
            return False
        if not self._caller_knows:
            self._caller_knows = True
            self.future.set_running_or_notify_cancel()
        return True

    def finish(self) -> None:
        """Deliver the result of the searches; drop it if the request was cancelled."""
        error = next((search.error for search in self.searches if search.error is not None), None)
        if error is not None:
            self.resolve(Result(status=Status.FAILED, error=error))
            return
        completions = tuple(c for search in self.searches for c in search.completions())
        if self.searches and (not completions or any(isnan(c.logprob) for c in completions)):
            self.resolve(Result(status=Status.FAILED, error=NOT_FINITE))
        else:
            self.resolve(Result(completions=completions, num_prompt_tokens=len(self.prompt_ids)))

    def resolve(self, result: Result) -> None:
        self._end(self.future.set_result, result)

    def fail(self, error: BaseException) -> None:
        self._end(self.future.set_exception, error)

    def _end(self, end: Callable[[Any], None], outcome: Result | BaseException) -> None:
        """End the future, unless the caller has cancelled it; the caller may do so while this runs."""
        if self.is_dropped():
            return
        if self.future.set_running_or_notify_cancel():
            run_callbacks(end, outcome)
        else:
            self._caller_knows = True


def run_callbacks(end: Callable[..., object], *outcome: object) -> None:
    """End a future, which runs its done callbacks: they are the callers', and may raise anything."""
    try:
        end(*outcome)
    except BaseException:  # a future itself logs errors below Exception
        logger.exception("a done callback has raised an error; the callbacks after it are not called")
