"""The replica on the accelerator: one engine for every request that reaches it, and a retrieval model if the
service has one.

The rule: a bad request is a result with a status. An exception means that the engine itself has failed, and
the replica ends, so that Serve replaces it. `Captioner` is a plain class, which needs Ray only for its
metrics; `deploy.app` makes a deployment of it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from blip2_actor import (
    Blip2Actor,
    Embedding,
    EngineBuilder,
    EngineStats,
    GenerationOptions,
    MatchingConfig,
    ModelInfo,
    Request,
    Result,
)
from deploy.observe.logs import LogLevel, set_log_level
from deploy.observe.metrics import observe_step, show_engine
from deploy.observe.tracing import TextSpans, is_tracing
from deploy.work import BatchOutcome, BatchWork, ImageOutputs, ImageWork, OtherModel, TextPiece

logger = logging.getLogger("ray.serve")

STALLED_AFTER_S = 120.0
"""An engine that has work and makes no progress for this long is replaced; compiling takes less."""
CROSS_ATTENTIONS = "qformer.*.cross_attention"
"""Attention maps that show where in the image the Q-Former looked."""
GATHER_S = 0.02
"""Results of a batch travel together if they are finished within this time of each other."""
NUM_WAITING_THREADS = 64
"""Threads that wait for scores and vectors; the engine computes those of all threads in one batch."""

T = TypeVar("T")


class Captioner:
    """One engine. It takes pixels only: untrusted bytes are decoded elsewhere."""

    def __init__(
        self, engine: EngineBuilder, options: GenerationOptions, matching: MatchingConfig | None = None
    ) -> None:
        # The retrieval model comes first, because the engine takes the memory that is still free.
        self._matching_info = None if matching is None else matching.info()
        self._matcher: Any = None if matching is None else matching.build()
        self._actor = Blip2Actor(engine, options)
        self._actor.engine.step_watchers.append(observe_step)
        self._threads = ThreadPoolExecutor(NUM_WAITING_THREADS, "waiting")
        self._threads_of_batches = ThreadPoolExecutor(NUM_WAITING_THREADS, "waiting-batch")
        """Threads for batch work, which waits while other requests keep the engine busy."""
        self._progress: tuple[int, ...] = ()
        self._progress_at_s = time.monotonic()

    async def run(self, pixels: np.ndarray, work: ImageWork) -> ImageOutputs:
        """Make all outputs of an image, uint8[S, S, 3]; a caller that disconnects frees its slots.

        Without a retrieval model, `matches` and `contrastive` must not be asked for.

        Raises:
            OtherModel: the model takes images of another size.
        """
        self._require_size(pixels)
        with _end_replica_on_fault():
            return await self._make(pixels, work)

    async def stream(
        self, pixels: np.ndarray, work: ImageWork
    ) -> AsyncGenerator[TextPiece | ImageOutputs, None]:
        """Yield the texts in pieces as they grow, and at the end what `run` returns.

        Texts of beam search, and several texts per prompt, are not sent in pieces.

        Raises:
            OtherModel: as `run`.
        """
        self._require_size(pixels)
        loop = asyncio.get_running_loop()
        grown: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()

        def report(index: int, text: str) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(grown.put_nowait, (index, text))

        making = asyncio.ensure_future(self._make(pixels, work, report))
        making.add_done_callback(lambda _: grown.put_nowait(None))
        sent = [""] * len(work.texts)
        try:
            while (item := await grown.get()) is not None:
                index, text = item
                if piece := _added(sent, index, text):
                    yield piece
            with _end_replica_on_fault():
                outputs = await making
            for index, result in enumerate(outputs.texts):
                if piece := _added(sent, index, result.text or ""):
                    yield piece
            yield outputs
        finally:
            making.cancel()

    async def run_batch(
        self, images: np.ndarray, work: BatchWork, digest: str
    ) -> AsyncGenerator[list[tuple[int, BatchOutcome]], None]:
        """Work on images, uint8[N, S, S, 3], at low priority; yield positions and outcomes as they finish.

        A caller that leaves frees the slots of its texts, and the threads that wait for the rest.

        Raises:
            OtherModel: the model has another digest.
        """
        if self._actor.info.digest != digest:
            raise OtherModel
        shared = [self._actor.engine.image(pixels) for pixels in images]
        for image in shared:
            image.low_priority = True
        running: dict[asyncio.Future[Any], Sequence[int]] = {
            self._submit(one.request(shared), index, None): [index] for index, one in enumerate(work.texts)
        }
        readings = work.readings(self._actor.engine, shared)

        loop = asyncio.get_running_loop()

        def read_on() -> None:
            for positions, call in islice(readings, 1):
                running[loop.run_in_executor(self._threads_of_batches, call)] = positions

        try:
            read_on()
            while running:
                await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.sleep(GATHER_S)
                done = [future for future in running if future.done()]
                finished: list[tuple[int, BatchOutcome]] = []
                with _end_replica_on_fault():
                    for future in done:
                        found, positions = future.result(), running.pop(future)
                        is_reading = isinstance(found, list)
                        finished += zip(positions, found if is_reading else [found], strict=True)
                        if is_reading:
                            read_on()
                yield finished
        finally:
            for future in running:
                future.cancel()
            for image in shared:
                image.cancel()

    async def embed_texts(self, texts: Sequence[str]) -> list[Embedding]:
        """Return the retrieval model's vectors of texts."""
        with _end_replica_on_fault():
            return await self._wait(texts, lambda: self._matcher.text_embeddings(texts))

    async def _make(
        self, pixels: np.ndarray, work: ImageWork, report: Callable[[int, str], None] | None = None
    ) -> ImageOutputs:
        engine, matcher = self._actor.engine, self._matcher
        image = engine.image(pixels)  # encoded once, however much is asked of it
        image.keeps_image_embeds = work.attention  # so that the maps need no second pass
        texts = [
            self._submit(Request(image=image, prompt=text.prompt, options=text.options), index, report)
            for index, text in enumerate(work.texts)
        ]
        wanted, prompts = [score.text for score in work.scores], [score.prompt for score in work.scores]
        maps = CROSS_ATTENTIONS if work.attention else False
        try:
            parts = await asyncio.gather(
                asyncio.gather(*texts),
                self._wait(wanted, lambda: engine.score([image] * len(wanted), wanted, prompts)),
                self._wait(work.matches, lambda: matcher.score([pixels] * len(work.matches), work.matches)),
                self._wait(
                    work.features or work.attention,
                    lambda: engine.features([image], with_attention_maps=maps),
                ),
                self._wait(work.contrastive, lambda: matcher.image_embeddings([pixels])),
            )
        finally:
            image.cancel()  # a caller that has left frees the threads above
        results, scores, matches, features, vectors = parts
        outputs = ImageOutputs(
            texts=tuple(results),
            scores=tuple(scores),
            matches=tuple(matches),
            # The maps of each layer are large, and stay here.
            features=next((replace(one, attention_maps=None) for one in features), None),
            attention=next((one.attention_grid for one in features), None),
            contrastive=next(iter(vectors), None),
            model=self._actor.info,
        )
        ids = [completion.token_ids for completion in outputs.completions] if work.token_texts else []
        token_texts = await self._wait(ids, lambda: [tuple(engine.prompts.token_texts(one)) for one in ids])
        return replace(outputs, token_texts=tuple(token_texts))

    def _require_size(self, pixels: np.ndarray) -> None:
        if len(pixels) != self._actor.info.image_size_px:
            raise OtherModel

    def _submit(
        self, request: Request, index: int, report: Callable[[int, str], None] | None
    ) -> asyncio.Future[Result]:
        on_text = None if report is None else partial(report, index)
        if not is_tracing():
            return asyncio.wrap_future(self._actor.submit(request, on_text))
        spans = TextSpans(on_text)
        result = asyncio.wrap_future(self._actor.submit(request, spans.on_text))
        result.add_done_callback(lambda done: spans.end(_attributes(done)))
        return result

    async def _wait(self, wanted: object, call: Callable[[], list[T]]) -> list[T]:
        """Return the result of an engine's call without blocking the loop; an empty list if not wanted."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, call) if wanted else []

    def info(self) -> ModelInfo:
        return self._actor.info

    def matching_info(self) -> ModelInfo | None:
        """Describe the retrieval model; None without one."""
        return self._matching_info

    def stats(self) -> EngineStats:
        return self._actor.stats()

    def set_log_level(self, level: LogLevel) -> None:
        set_log_level(level)

    def check_health(self) -> None:
        """Raise RuntimeError when the engine has work and makes no progress; Serve replaces the replica."""
        stats = self._actor.stats()
        show_engine(self._actor.info, stats)
        progress = (stats.num_finished, stats.num_encode_calls, stats.num_decode_steps)
        now_s = time.monotonic()
        if progress != self._progress or stats.num_running + stats.num_waiting == 0:
            self._progress, self._progress_at_s = progress, now_s
        elif now_s - self._progress_at_s > STALLED_AFTER_S:
            raise RuntimeError(
                f"the engine has made no progress for {now_s - self._progress_at_s:.0f} s "
                f"with {stats.num_running} running and {stats.num_waiting} waiting requests"
            )

    def __del__(self) -> None:
        # Serve calls this after the last request; when the constructor has failed, there is no actor.
        if hasattr(self, "_actor"):
            self._actor.close()
        if getattr(self, "_matcher", None) is not None:
            self._matcher.close()


def _attributes(done: asyncio.Future[Result]) -> dict[str, str | int]:
    """Return what a trace says about a text, never the text itself."""
    if done.cancelled() or done.exception() is not None:
        return {"blip2.status": "cancelled" if done.cancelled() else "failed"}
    result = done.result()
    return {"blip2.status": result.status.value, "blip2.num_tokens": len(result.token_ids)}


def _added(sent: list[str], index: int, text: str) -> TextPiece | None:
    """Return and record the part of a text that is new since the last piece."""
    before = sent[index]
    if text == before or not text.startswith(before):  # a text that has failed is empty
        return None
    sent[index] = text
    return TextPiece(index=index, text=text[len(before) :])


@contextmanager
def _end_replica_on_fault() -> Iterator[None]:
    """End the process when the engine has failed.

    A replica without an engine would answer fastest, and Serve would send it all requests until the next
    health check.
    """
    try:
        yield
    except Exception:
        logger.exception("the engine has failed; this replica ends, so that Serve replaces it")
        os._exit(1)
