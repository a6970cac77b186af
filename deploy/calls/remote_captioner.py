"""The captioners as a gateway sees them: calls through Serve's handles, and the models that they run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from blip2_actor import Calibration, Embedding, ModelInfo
from deploy.calls.handshake import handshake
from deploy.calls.shared_calls import begin_shared
from deploy.http.errors import overloaded, unavailable
from deploy.http.served_model import ServedModel, require_name
from deploy.settings import Settings
from deploy.work import BatchOutcome, BatchWork, ImageOutputs, ImageWork, OtherModel, TextPiece


class Models:
    """The models of a service by name, each with captioners of its own.

    Only its engines can describe a model. They are asked when a request names the model for the first time,
    so that the engines of unused models may stay stopped.
    """

    first: ServedModel
    """The model of a request that names none, once `start` has returned."""

    def __init__(
        self, first: RemoteCaptioner, others: Mapping[str, RemoteCaptioner], settings: Settings
    ) -> None:
        self._first = first
        self._others = others
        self._settings = settings
        self._served: dict[str, ServedModel] = {}
        """The other models whose engines have answered."""
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._calibration: Calibration | None = None

    async def start(self) -> None:
        """Wait for the engines of the first model.

        Raises:
            ValueError: the options of the service, or its retrieval model, do not fit the model.
        """
        self._calibration = await asyncio.to_thread(self._settings.read_calibration)
        info = await self._first.info()
        self.first = self._describe(info.model, True, info, await self._first.matching_info())

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([self.first.name, *self._others]))

    def captioner(self, model: ServedModel) -> RemoteCaptioner:
        return self._first if model.is_first else self._others[model.name]

    def find(self, name: str) -> ServedModel | None:
        """Return a model if its engines have answered, else None; raise ApiError 404 for an unknown name."""
        require_name(self.names, name)
        return self._served.get(name) if name in self._others else self.first

    def known(self, name: str) -> ServedModel | None:
        """Return a further model if its engines have answered; otherwise start them, and return None."""
        if name not in self._served:
            self._begin_to_ask(name)
        return self._served.get(name)

    async def get(self, name: str) -> ServedModel:
        """Return a further model; wait for its engines if they have not answered yet.

        Raises:
            ApiError: 503; no engine can answer.
        """
        if name not in self._served:
            await asyncio.shield(self._begin_to_ask(name))
        return self._served[name]

    def _begin_to_ask(self, name: str) -> asyncio.Task[None]:
        asking = self._asking.get(name)
        if asking is None or asking.done():
            asking = self._asking[name] = begin_shared(self._ask(name))
            asking.add_done_callback(lambda done: done.cancelled() or done.exception())  # which reads it
        return asking

    async def _ask(self, name: str) -> None:
        with _no_engine_is_503():
            self._served[name] = self._describe(name, False, await self._others[name].info(), None)

    def update(self, model: ServedModel, info: ModelInfo) -> None:
        """Replace the description of a model by that of the engine that has just answered."""
        options = self._settings.options.resolve(info.generation_config)
        updated = replace(model.made_by(info), options=options)
        if model.is_first:
            self.first = updated
        else:
            self._served[model.name] = updated

    def _describe(
        self, name: str, is_first: bool, info: ModelInfo, matching: ModelInfo | None
    ) -> ServedModel:
        self._settings.require_fit(info, matching)
        options = self._settings.options.resolve(info.generation_config)
        return ServedModel(
            name=name,
            is_first=is_first,
            info=info,
            options=options,
            matching=matching,
            calibration=self._calibration,
            min_confidence=self._settings.min_confidence,
        )


class RemoteCaptioner:
    """Calls one of the replicas of `Captioner`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def info(self) -> ModelInfo:
        return await self._handle.info.remote()

    async def matching_info(self) -> ModelInfo | None:
        return await self._handle.matching_info.remote()

    async def run(self, pixels: np.ndarray, work: ImageWork) -> ImageOutputs:
        """Do what `Captioner.run` does.

        Raises:
            ApiError: 503; no engine can take the request.
        """
        return await self._answer("run", pixels, work)

    async def embed_texts(self, texts: Sequence[str]) -> list[Embedding]:
        """Do what `Captioner.embed_texts` does; raise what `run` raises."""
        return await self._answer("embed_texts", texts)

    def stream(self, pixels: np.ndarray, work: ImageWork) -> AsyncGenerator[TextPiece | ImageOutputs, None]:
        """Do what `Captioner.stream` does; raise what `run` raises, at the start or later."""
        return self._items("stream", pixels, work)

    def run_batch(
        self, images: np.ndarray, work: BatchWork, digest: str
    ) -> AsyncGenerator[list[tuple[int, BatchOutcome]], None]:
        """Do what `Captioner.run_batch` does; raise what `run` raises, at the start or later."""
        return self._items("run_batch", images, work, digest)

    async def _answer(self, method: str, *arguments: Any) -> Any:
        """Return what a method of a captioner returns.

        If the captioner dies meanwhile, another one is asked, but only once: an image that kills its
        captioner must not reach all of them. Captioners that were already dead do not count.
        """
        with _no_engine_is_503():
            try:
                return await self._ask(method, *arguments)
            except RayActorError:
                return await self._ask(method, *arguments, again=True)

    async def _ask(self, method: str, *arguments: Any, again: bool = False) -> Any:
        """Ask one captioner; if the wait is cancelled, free the slots of its engine."""
        with handshake() if again else nullcontext():
            response = getattr(self._handle, method).remote(*arguments)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise

    async def _items(self, method: str, *arguments: Any) -> AsyncGenerator[Any, None]:
        """Yield what a method of a captioner yields; ask again as `_answer` does, until the first item."""
        is_started = False
        with _no_engine_is_503():
            for again in (False, True):
                try:
                    async with aclosing(self._ask_for_items(method, *arguments, again=again)) as items:
                        async for item in items:
                            is_started = True
                            yield item
                    return
                except RayActorError:
                    if is_started or again:
                        raise

    async def _ask_for_items(
        self, method: str, *arguments: Any, again: bool = False
    ) -> AsyncGenerator[Any, None]:
        """Ask one captioner; if that ends early, free the slots of its engine."""
        with handshake() if again else nullcontext():
            response = self._handle.options(method_name=method, stream=True).remote(*arguments)
        is_complete = False
        try:
            async for item in response:
                yield item
            is_complete = True
        finally:
            if not is_complete:
                response.cancel()


@contextmanager
def _no_engine_is_503() -> Iterator[None]:
    try:
        yield
    except (BackPressureError, DeploymentUnavailableError, RayActorError):
        raise overloaded("no engine can take the request now") from None
    except OtherModel:
        raise unavailable("the model is being updated") from None
