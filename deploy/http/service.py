"""What the routes need of the object behind them; `Gateway` is the real one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from blip2_actor import (
    Calibration,
    Embedding,
    FetchPolicy,
    GenerationOptions,
    ModelInfo,
)
from deploy.guard.cost import Cost, cost_of
from deploy.http.errors import ApiError, shorten
from deploy.http.images import ImageSource
from deploy.observe.logs import LogLevel
from deploy.reuse.made import Made
from deploy.work import BatchOutcome, BatchWork, ImageWork, TextPiece


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedModel:
    """One of the models of the service, as its engines have described it."""

    name: str
    """By which requests choose it."""
    info: ModelInfo
    options: GenerationOptions
    """Options of a request that names none."""
    matching: ModelInfo | None = None
    """The retrieval model next to it; None if it has none."""
    calibration: Calibration | None = None
    """Gives captions their confidence; None if the service has none."""
    min_confidence: float = 0.0
    """A caption with a lower confidence gets the flag `abstained`."""

    def made_by(self, info: ModelInfo | None) -> ServedModel:
        """Return the model as the engine describes it that has made an answer; None is this one."""
        if info is None or info == self.info:
            return self
        # The first model has no other name than that of its checkpoint.
        name = info.model if self.name == self.info.model else self.name
        return replace(self, name=name, info=info)


def require_name(names: Sequence[str], name: str) -> None:
    """Raise ApiError 404, in the shape of OpenAI, unless a model has this name."""
    if name not in names:
        known = " or ".join(names)
        raise ApiError(404, "model_not_found", f"model must be {known}, got {shorten(name)}")


class Operated(Protocol):
    """What an operator asks of all replicas."""

    async def set_draining(self, is_draining: bool) -> None: ...

    async def set_log_level(self, level: LogLevel) -> None: ...

    async def stats(self) -> dict[str, list[dict[str, Any]]]: ...


class Service(Protocol):
    """Admits, decodes, and has an engine work; a status other than ok is raised as an `ApiError`."""

    first: ServedModel
    """The model of a request that names none."""
    image_policy: FetchPolicy
    """Maximum size of one image, and the hosts whose images are fetched; without hosts, none is."""

    @property
    def model_names(self) -> Sequence[str]:
        """The names of all models, that of the first one first."""
        ...

    @property
    def fleet(self) -> Operated:
        """All replicas, for the operator."""
        ...

    def model(
        self, name: str | None, *, may_be_on_trial: bool = False
    ) -> AbstractAsyncContextManager[ServedModel]:
        """Let the block have the model that a request names, or the first one.

        The engines of others may start for it. Then the request is admitted before it waits for them, and its
        time is that of the block.

        Args:
            may_be_on_trial: whether the model of an A/B test may take the place of the first one.

        Raises:
            ApiError: 404 no model has this name, 503 its engines do not run, and what `admit` raises.
        """
        ...

    def admit(self, cost: Cost) -> AbstractAsyncContextManager[None]:
        """Hold what a request costs while the block runs, and end the block when its time is over.

        Raises:
            ApiError: 503 when too much is being served, 429 when this caller has too much in flight, 504
                when the time is over, or 503 if no engine runs then.
        """
        ...

    def serve(self, cost: Cost) -> AbstractAsyncContextManager[None]:
        """Do as `admit`, but hold no slots: the block holds them part by part, with `slots`.

        Args:
            cost: of all parts.
        """
        ...

    def slots(self, cost: Cost) -> AbstractAsyncContextManager[None]:
        """Wait for slots, and hold them while the block runs, which is inside one of `serve`."""
        ...

    def admit_batch(self, cost: Cost) -> AbstractAsyncContextManager[Callable[[], None]]:
        """Admit batch work next to all other requests; the block calls what it gets now and then.

        Raises:
            ApiError: 403 when the key has no right to it; 503 when there is enough, and from the call when
                the work should end because the service does, or its time is over.
        """
        ...

    def run_batch(
        self, model: ServedModel, images: np.ndarray, work: BatchWork
    ) -> AsyncGenerator[list[tuple[int, BatchOutcome]], None]:
        """Work at low priority; yield positions and outcomes as they are finished.

        Args:
            images: uint8[N, S, S, 3].
        """
        ...

    async def make(
        self, model: ServedModel, source: ImageSource, work: ImageWork, *, needs_tokens: bool = False
    ) -> Made:
        """Load and decode an image, and make everything that is asked of it; equal requests share the work.

        Args:
            needs_tokens: token ids are needed, which the captions of a finished run do not have.

        Raises:
            ApiError: the image cannot be fetched or decoded, or a part is not ok.
        """
        ...

    def stream(
        self, model: ServedModel, source: ImageSource, work: ImageWork
    ) -> AsyncGenerator[TextPiece | Made, None]:
        """Yield texts in pieces, and at the end what `make` would return; raise what that raises."""
        ...

    async def embed_texts(self, texts: Sequence[str]) -> list[Embedding]:
        """Return the retrieval model's vectors of texts, one each; raise ApiError unless all are ok."""
        ...

    async def check_ready(self) -> None:
        """Raise ApiError 503 unless an engine runs or would be started for a request."""
        ...


async def make_each(
    service: Service, model: ServedModel, images: Sequence[ImageSource], work: ImageWork
) -> list[Made]:
    """Score or embed images, admitted together; the first that fails ends all.

    Raises:
        ApiError: as from `Service`.
    """
    async with service.admit(cost_of(work, num_images=len(images))):
        tasks = [asyncio.ensure_future(service.make(model, source, work)) for source in images]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
