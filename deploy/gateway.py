"""The replica that callers reach: HTTP, admission and image decoding on CPU.

The rule: untrusted bytes end here. They are decoded in child processes with limits, and only pixels go on
to a `Captioner`. `Gateway` is a plain class; `deploy.app` makes the ingress deployment of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any

import numpy as np
from fastapi import FastAPI
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle

from blip2_actor import DecodedImage, Embedding, FetchPolicy, ModelInfo, Status
from deploy.calls.remote_captioner import Models, RemoteCaptioner
from deploy.fetching import Fetching
from deploy.guard.access import Access
from deploy.guard.admission import Admission
from deploy.guard.cost import Cost
from deploy.guard.decoding import DecodingBySize
from deploy.guard.keys import KeyFile
from deploy.guard.uploads import give_back_large_memory, take_passed_bodies
from deploy.http.api import create_api
from deploy.http.errors import ApiError, of_status, unavailable
from deploy.http.images import ImageSource
from deploy.http.lanes import in_lane
from deploy.http.service import ServedModel
from deploy.observe.fleet import Fleet
from deploy.observe.logs import LogLevel, set_log_level
from deploy.observe.metrics import IMAGE_DECODE_SECONDS
from deploy.observe.request_record import RECORD, AccessLog, timed
from deploy.readiness import Readiness
from deploy.reuse.finished_run import FinishedRun
from deploy.reuse.made import Made, sha256_of
from deploy.reuse.shared_work import SharedWork
from deploy.settings import Settings
from deploy.trials.trials import Trials
from deploy.work import BatchOutcome, BatchWork, ImageOutputs, ImageWork, TextPiece

logger = logging.getLogger("ray.serve")

STORE_WITHIN_S = 5.0
"""Seconds for asking the cluster whether the service is drained."""


class Gateway:
    """Admits, reads and decodes requests, and hands uint8[S, S, 3] to the engine's replicas."""

    first: ServedModel

    async def __init__(  # type: ignore[misc]
        self,
        captioner: DeploymentHandle,
        settings: Settings,
        others: Mapping[str, DeploymentHandle] | None = None,
    ) -> None:
        """Wait for the engines of the first model; those of others may sleep until a request names them.

        Args:
            captioner: the replicas of the first model.
            settings: what the endpoint is built from.
            others: the replicas of further models, by name.
        """
        give_back_large_memory()
        take_passed_bodies()
        self.image_policy: FetchPolicy = settings.image_policy
        self._access: dict[str, Any] = {
            "allowed_hosts": settings.allowed_hosts,
            "allowed_origins": settings.allowed_origins,
            "keys": None if settings.keys_file is None else KeyFile(settings.keys_file),
            "admin_keys": None if settings.admin_keys_file is None else KeyFile(settings.admin_keys_file),
            "max_in_flight": max(1, settings.max_in_flight // 2),
        }
        self._admission = Admission(
            slots=settings.slots, max_in_flight=settings.max_in_flight, timeout_s=settings.timeout_s
        )
        others = others or {}
        remote = {name: RemoteCaptioner(handle) for name, handle in others.items()}
        self._models = Models(RemoteCaptioner(captioner), remote, settings)
        self.first = await self._models.start()
        self._trials = Trials(settings, self._models, lambda: self._admission.is_busy)
        deployments = [handle.deployment_name for handle in (captioner, *others.values())]
        self._readiness = Readiness(captioner.app_name, deployments)
        self.fleet = Fleet(captioner.app_name, deployments)
        self._shared_work = SharedWork(settings.cache_bytes)
        self._finished_run: FinishedRun | None = None
        if settings.cache_from is not None:
            self._finished_run = FinishedRun(settings.cache_from, self.first.info, settings.image)
            await asyncio.to_thread(self._finished_run.read_index)
        self._decoding = DecodingBySize(settings.image, settings.decode_children)
        self._fetching = Fetching(self.image_policy)
        logger.info("%s", self._decoding.of(self.first.info.image_size_px).sandbox_report())
        self._is_ending = False
        self._was_told = False
        """Whether the operator has called since the store was last read; what is read next may be older."""
        await self.check_health()
        if self.stats()["is_draining"]:
            logger.warning("an operator has drained the service; POST /admin/resume ends that")

    def __serve_build_asgi_app__(self) -> FastAPI:
        api = create_api(self)
        api.add_middleware(Access, **self._access)
        api.add_middleware(AccessLog)
        return api

    @property
    def model_names(self) -> Sequence[str]:
        return self._models.names

    @asynccontextmanager
    async def model(self, name: str | None, *, may_be_on_trial: bool = False) -> AsyncIterator[ServedModel]:
        model = self.first if name is None else self._models.find(name)
        if name is None and may_be_on_trial:
            model = self._trials.choose(self.first)
        if (record := RECORD.get()) is not None:
            record.model = name if model is None else model.name
        if model is not None:
            yield model
            return
        assert name is not None
        try:
            async with self.serve(None):
                model = await self._models.get(name)
                yield model
        except ApiError as error:
            if error.code == 504 and model is None:
                raise unavailable(f"the engines of {name} are starting") from None
            raise

    @asynccontextmanager
    async def admit(self, cost: Cost) -> AsyncIterator[None]:
        async with self.serve(cost), self.slots(cost):
            yield

    @asynccontextmanager
    async def serve(self, cost: Cost | None) -> AsyncIterator[None]:
        if cost is not None and (record := RECORD.get()) is not None:
            record.slots, record.steps = cost.slots, cost.steps
        try:
            async with self._admission.serve(cost):
                yield
        except ApiError as error:
            if error.code == 504:
                await self._readiness.check()  # without any engine it is 503
            raise

    def slots(self, cost: Cost) -> AbstractAsyncContextManager[None]:
        return self._admission.slots(cost)

    def admit_batch(self, cost: Cost) -> AbstractAsyncContextManager[Callable[[], None]]:
        if (record := RECORD.get()) is not None:
            record.slots, record.steps = cost.slots, cost.steps
        return self._admission.admit_batch(cost)

    async def load(self, image: ImageSource) -> bytes:
        return image if isinstance(image, bytes) else await self._fetching.fetch(image)

    async def decode(self, model: ServedModel, image: bytes) -> DecodedImage:
        with timed("decode", IMAGE_DECODE_SECONDS):
            decoded = await self._decoding.of(model.info.image_size_px).decode(image)
        if decoded.status is not Status.OK:
            raise of_status(decoded.status, decoded.error)
        return decoded

    async def make(
        self, model: ServedModel, source: ImageSource, work: ImageWork, *, needs_tokens: bool = False
    ) -> Made:
        made = await self._make_or_find(model, source, work, needs_tokens)
        self._trials.record_answer(model, work, made)
        return made

    async def _make_or_find(
        self, model: ServedModel, source: ImageSource, work: ImageWork, needs_tokens: bool
    ) -> Made:
        image = await self.load(source)
        digest = await in_lane(len(image), lambda: sha256_of(image))
        if self._finished_run is not None and model is self.first and not needs_tokens:
            stored = await self._finished_run.look_up(digest, work)
            if stored is not None:
                return stored
        key = (model.name, model.info.digest, digest, work)
        return await self._shared_work.get(key, lambda: self._make(model, image, digest, work))

    async def _make(self, model: ServedModel, image: bytes, digest: str, work: ImageWork) -> Made:
        decoded = await self.decode(model, image)
        made = Made.of(digest, decoded, await self.run(model, decoded, work))
        if model is self.first:
            self._trials.copy(model, decoded.array(model.info.image_size_px), work, made)
        return made

    async def run(self, model: ServedModel, image: DecodedImage, work: ImageWork) -> ImageOutputs:
        """Make everything that is asked of an image; raise ApiError unless every part is ok."""
        with timed("engine"):
            captioner = self._models.captioner(model)
            outputs = await captioner.run(image.array(model.info.image_size_px), work)
        if outputs.failure is not None:
            raise of_status(*outputs.failure)
        if outputs.model is not None and outputs.model != model.info:
            self._update(model, outputs.model)
        return outputs

    def _update(self, model: ServedModel, info: ModelInfo) -> None:
        """Know a model as it is now; its engines may be replaced after this gateway has asked them."""
        updated = self._models.update(model, info)
        if model is self.first:
            self.first = updated
            self._finished_run = None  # it was of the former model

    async def stream(
        self, model: ServedModel, source: ImageSource, work: ImageWork
    ) -> AsyncGenerator[TextPiece | Made, None]:
        image = await self.load(source)
        digest = await in_lane(len(image), lambda: sha256_of(image))
        decoded = await self.decode(model, image)
        pixels = decoded.array(model.info.image_size_px)
        with timed("engine"):
            async with aclosing(self._models.captioner(model).stream(pixels, work)) as items:
                async for item in items:
                    if isinstance(item, TextPiece):
                        yield item
                        continue
                    if item.failure is not None:
                        raise of_status(*item.failure)
                    made = Made.of(digest, decoded, item)
                    self._trials.record_answer(model, work, made)
                    yield made

    async def run_batch(
        self, model: ServedModel, images: np.ndarray, work: BatchWork
    ) -> AsyncGenerator[list[tuple[int, BatchOutcome]], None]:
        captioner = self._models.captioner(model)
        async with aclosing(captioner.run_batch(images, work, model.info.digest)) as finished:
            async for results in finished:
                yield results

    async def embed_texts(self, texts: Sequence[str]) -> list[Embedding]:
        embeddings = await self._models.captioner(self.first).embed_texts(texts)
        for embedding in embeddings:
            if embedding.status is not Status.OK:
                raise of_status(embedding.status, embedding.error)
        return embeddings

    async def drain(self) -> None:
        """Be unready, refuse new requests, and return when the running ones have their answers."""
        self._is_ending = True
        await self._admission.drain()

    async def check_health(self) -> None:
        """Show what goes on, and follow what the operator has asked of all gateways.

        This one may have missed it at its start.
        """
        self._admission.show()
        self._shared_work.show()
        try:
            async with asyncio.timeout(STORE_WITHIN_S):
                is_draining = await self.fleet.is_draining()
        except (RayError, TimeoutError):  # the head of the cluster is away; this gateway can go on without it
            return
        if not self._was_told:
            self._follow(is_draining)
        self._was_told = False
        self._trials.write_if_due()

    def set_draining(self, is_draining: bool) -> None:
        """Be unready and refuse new requests, or take them again; a gateway that ends takes none again."""
        self._was_told = True
        self._follow(is_draining)

    def _follow(self, is_draining: bool) -> None:
        self._admission.set_draining(is_draining or self._is_ending)

    def set_log_level(self, level: LogLevel) -> None:
        set_log_level(level)

    def stats(self) -> dict[str, int | bool]:
        """Return what this gateway is doing now."""
        return self._admission.stats()

    async def check_ready(self) -> None:
        self._admission.check_open()
        await self._readiness.check()

    def __del__(self) -> None:
        if hasattr(self, "_decoding"):
            self._decoding.close()
            self._fetching.close()
            self._trials.close()
