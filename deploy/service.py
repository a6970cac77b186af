"""What the routes need: admission, images, and the work of engines; `Gateway` puts HTTP in front of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager

import numpy as np

from blip2_actor import DecodedImage, Embedding, FetchPolicy, Status
from deploy.calls.remote_captioner import Models
from deploy.fetching import Fetching
from deploy.guard.admission import Admission
from deploy.guard.cost import Cost, cost_of
from deploy.guard.decoding import DecodingBySize
from deploy.http.errors import ApiError, of_status, unavailable
from deploy.http.images import ImageSource
from deploy.http.lanes import in_lane
from deploy.http.served_model import ServedModel
from deploy.observe.fleet import Fleet
from deploy.observe.metrics import IMAGE_DECODE_SECONDS
from deploy.observe.request_record import RECORD, timed
from deploy.readiness import Readiness
from deploy.reuse.finished_run import FinishedRun
from deploy.reuse.made import Made, sha256_of
from deploy.reuse.shared_work import SharedWork
from deploy.settings import Settings
from deploy.trials.trials import Trials
from deploy.work import BatchOutcome, BatchWork, ImageOutputs, ImageWork, TextPiece


class Service:
    """Admits, decodes, and has an engine work; a status other than ok is raised as an `ApiError`."""

    def __init__(
        self,
        settings: Settings,
        models: Models,
        readiness: Readiness,
        fleet: Fleet,
        finished_run: FinishedRun | None = None,
    ) -> None:
        """Put a service together.

        Args:
            settings: the limits of the service.
            models: the models and their captioners.
            readiness: knows whether engines run.
            fleet: all replicas, for the operator.
            finished_run: of the first model; None answers nothing from a run.
        """
        self.image_policy: FetchPolicy = settings.image_policy
        """Maximum size of one image, and the hosts whose images are fetched; without hosts, none is."""
        self.fleet = fleet
        self._models = models
        self._readiness = readiness
        self._finished_run = finished_run
        self._admission = Admission(
            slots=settings.slots, max_in_flight=settings.max_in_flight, timeout_s=settings.timeout_s
        )
        self._trials = Trials(settings, models, lambda: self._admission.is_busy)
        self._shared_work = SharedWork(settings.cache_bytes)
        self._decoding = DecodingBySize(settings.image, settings.decode_children)
        self._fetching = Fetching(self.image_policy)

    # Models and admission -----------------------------------------------------------------------------------

    @property
    def first(self) -> ServedModel:
        """The model of a request that names none."""
        return self._models.first

    @property
    def model_names(self) -> Sequence[str]:
        """The names of all models, that of the first one first."""
        return self._models.names

    @asynccontextmanager
    async def model(self, name: str | None, *, may_be_on_trial: bool = False) -> AsyncIterator[ServedModel]:
        """Provide the model that a request names, or the first one, inside the block.

        The engines of other models may have to start first. Then the request is admitted before it waits for
        them, and its time limit covers the whole block.

        Args:
            may_be_on_trial: whether the model of an A/B test may take the place of the first one.

        Raises:
            ApiError: 404 no model has this name, 503 its engines do not run, and what `admit` raises.
        """
        model = self.first if name is None else self._models.find(name)
        if name is None and may_be_on_trial:
            model = self._trials.choose(self.first)
        RECORD.get().model = name if model is None else model.name
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
        """Hold what a request costs while the block runs, and end the block when its time is over.

        Raises:
            ApiError: 503 when too much is being served, 429 when this caller has too much in flight, 504
                when the time is over, or 503 if no engine runs then.
        """
        async with self.serve(cost), self.slots(cost):
            yield

    @asynccontextmanager
    async def serve(self, cost: Cost | None) -> AsyncIterator[None]:
        """Admit like `admit`, but hold no slots: the block takes them part by part, with `slots`.

        Args:
            cost: of all parts; None if it is not known yet.
        """
        if cost is not None:
            _record(cost)
        try:
            async with self._admission.serve(cost):
                yield
        except ApiError as error:
            if error.code == 504:
                await self._readiness.check()  # without any engine it is 503
            raise

    def slots(self, cost: Cost) -> AbstractAsyncContextManager[None]:
        """Wait for slots, and hold them while the block runs; call it inside a block of `serve`."""
        return self._admission.slots(cost)

    def admit_batch(self, cost: Cost) -> AbstractAsyncContextManager[Callable[[], None]]:
        """Admit batch work next to all other requests; the block must now and then call what it gets.

        Raises:
            ApiError: 403 if the key has no right to it; 503 if there is enough batch work. The function
                raises it when the work should end, because the service does or its time is over.
        """
        _record(cost)
        return self._admission.admit_batch(cost)

    async def check_ready(self) -> None:
        """Raise ApiError 503 unless an engine runs or would be started for a request."""
        self._admission.check_open()
        await self._readiness.check()

    # Work ---------------------------------------------------------------------------------------------------

    async def make(
        self, model: ServedModel, source: ImageSource, work: ImageWork, *, needs_tokens: bool = False
    ) -> Made:
        """Load and decode an image, and make everything that is asked of it; equal requests share the work.

        Args:
            needs_tokens: token ids are needed, which the captions of a finished run do not have.

        Raises:
            ApiError: the image cannot be fetched or decoded, or a part is not ok.
        """
        made = await self._make_or_find(model, source, work, needs_tokens)
        self._trials.record_answer(model, work, made)
        return made

    async def make_each(
        self, model: ServedModel, sources: Sequence[ImageSource], work: ImageWork, field: str = "image"
    ) -> list[Made]:
        """Make the same of several images, admitted together; the first that fails ends all.

        Args:
            field: the field of the request that has them; the error of one of several names its place there.
        """

        async def make(index: int, source: ImageSource) -> Made:
            try:
                return await self.make(model, source, work)
            except ApiError as error:
                place = f"{field}.{index}"
                if len(sources) == 1 or error.code >= 503 or error.message.startswith(f"{place}:"):
                    raise
                raise ApiError(error.code, error.type, f"{place}: {error.message}") from None

        async with self.admit(cost_of(work, num_images=len(sources))):
            tasks = [asyncio.ensure_future(make(*one)) for one in enumerate(sources)]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

    async def stream(
        self, model: ServedModel, source: ImageSource, work: ImageWork
    ) -> AsyncGenerator[TextPiece | Made, None]:
        """Yield texts in pieces, and at the end what `make` would return; raise what that raises."""
        image, digest = await self._load(source)
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

    def run_batch(
        self, model: ServedModel, images: np.ndarray, work: BatchWork
    ) -> AsyncGenerator[list[tuple[int, BatchOutcome]], None]:
        """Work at low priority; yield positions and outcomes as they are finished.

        Args:
            images: uint8[N, S, S, 3].
        """
        return self._models.captioner(model).run_batch(images, work, model.info.digest)

    async def embed_texts(self, texts: Sequence[str]) -> list[Embedding]:
        """Return the retrieval model's vectors of texts, one each; raise ApiError unless all are ok."""
        embeddings = await self._models.captioner(self.first).embed_texts(texts)
        for embedding in embeddings:
            if embedding.status is not Status.OK:
                raise of_status(embedding.status, embedding.error)
        return embeddings

    async def _make_or_find(
        self, model: ServedModel, source: ImageSource, work: ImageWork, needs_tokens: bool
    ) -> Made:
        image, digest = await self._load(source)
        if self._finished_run is not None and model.is_first and not needs_tokens:
            stored = await self._finished_run.look_up(digest, work)
            if stored is not None:
                return stored
        key = (model.name, model.info.digest, digest, work)
        return await self._shared_work.get(key, lambda: self._make(model, image, digest, work))

    async def _make(self, model: ServedModel, image: bytes, digest: str, work: ImageWork) -> Made:
        decoded = await self.decode(model, image)
        made = Made.of(digest, decoded, await self.run(model, decoded, work))
        if model.is_first:
            self._trials.copy(model, decoded.array(model.info.image_size_px), work, made)
        return made

    async def _load(self, source: ImageSource) -> tuple[bytes, str]:
        """Return an encoded image, which may have to be fetched, and its SHA-256."""
        image = source if isinstance(source, bytes) else await self._fetching.fetch(source)
        return image, await in_lane(len(image), lambda: sha256_of(image))

    async def decode(self, model: ServedModel, image: bytes) -> DecodedImage:
        """Decode an image for a model; raise ApiError unless it is ok."""
        with timed("decode", IMAGE_DECODE_SECONDS):
            decoded = await self._decoding.of(model.info.image_size_px).decode(image)
        if decoded.status is not Status.OK:
            raise of_status(decoded.status, decoded.error)
        return decoded

    async def run(self, model: ServedModel, image: DecodedImage, work: ImageWork) -> ImageOutputs:
        """Make everything that is asked of an image; raise ApiError unless every part is ok."""
        with timed("engine"):
            captioner = self._models.captioner(model)
            outputs = await captioner.run(image.array(model.info.image_size_px), work)
        if outputs.failure is not None:
            raise of_status(*outputs.failure)
        if outputs.model is not None and outputs.model != model.info:
            # Its engines were replaced after this process asked them.
            self._models.update(model, outputs.model)
            if model.is_first:
                self._finished_run = None  # it was of the former model
        return outputs


def _record(cost: Cost) -> None:
    record = RECORD.get()
    record.slots, record.steps = cost.slots, cost.steps
