"""What the scheduler moves around: images waiting to be encoded, and the jobs that wait for them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from math import isnan
from typing import TYPE_CHECKING, Any

import numpy as np

from blip2_actor.generation.beam_search import BeamSearch
from blip2_actor.generation.search import TextSearch
from blip2_actor.options import GenerationOptions
from blip2_actor.request import Result
from blip2_actor.status import Status

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(eq=False)
class EncodedImage:
    """One image on its way through the encoder; requests that hold the same one share its pass.

    The tensors are there once the encoder has seen it, and live as long as this object is held.
    """

    pixels: np.ndarray
    """uint8[S, S, 3]."""
    maker: object = None
    """Who made it: another engine's tensors are another model's."""
    keeps_image_embeds: bool = False
    """Also keep the vision encoder's own output; large, so only where it is wanted."""
    prefix: Tensor | None = None
    """float[Q, Dw], what the language model sees of the image."""
    qformer_features: Tensor | None = None
    """float[Q, Dq]."""
    pooler_output: Tensor | None = None
    """float[Dv]."""
    image_embeds: Tensor | None = None
    """float[P, Dv]."""
    jobs: list[RequestState] = field(default_factory=list)
    """Those that wait for the encoder."""

    @property
    def is_encoded(self) -> bool:
        return self.prefix is not None and not (self.keeps_image_embeds and self.image_embeds is None)


NO_NUMBERS = "what the model computes of this image and text is no number; try --dtype float32"

Searches = list["TextSearch | BeamSearch"]


@dataclass(eq=False)
class RequestState:
    """One request between `submit` and its result; without searches it only wants its image encoded."""

    image: EncodedImage
    prompt_ids: list[int] = field(default_factory=list)
    options: GenerationOptions = field(default_factory=GenerationOptions)
    make_searches: Callable[[], Searches] = list
    future: Future[Result] = field(default_factory=Future)
    number: int = field(default_factory=count().__next__)
    """Of its arrival."""
    searches: Searches = field(init=False)
    _told: bool = False

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin at the first token again."""
        self.searches = self.make_searches()

    @property
    def num_slots(self) -> int:
        return sum(search.num_slots for search in self.searches)

    def is_dropped(self) -> bool:
        """True once the caller has cancelled; whoever waits for the future is told."""
        if not self.future.cancelled():
            return False
        if not self._told:
            self._told = True
            self.future.set_running_or_notify_cancel()
        return True

    def finish(self) -> None:
        """Deliver the result; a request that was cancelled meanwhile is dropped."""
        completions = tuple(c for search in self.searches for c in search.completions())
        if self.searches and (not completions or any(isnan(c.logprob) for c in completions)):
            self.resolve(Result(status=Status.FAILED, error=NO_NUMBERS))
        else:
            self.resolve(Result(completions=completions))

    def resolve(self, result: Result) -> None:
        if not self.is_dropped() and self.future.set_running_or_notify_cancel():
            self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        if not self.is_dropped() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


@dataclass(eq=False)
class Task:
    """Something else for the engine's thread to compute, between two steps."""

    work: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.work())
        except Exception as error:  # it belongs to whoever asked, in another thread
            self.future.set_exception(error)

    def fail(self, error: BaseException) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)
