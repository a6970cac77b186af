"""The engine as callers see it: captions, scores and features, from any thread.

`generate` and `stream` are thin shells over `submit`. Each method prepares its inputs in the caller's thread
and hands the rest to `EngineCore`, whose thread computes.
"""

from __future__ import annotations

import math
import queue
import weakref
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NoReturn

import numpy as np
from torch import Tensor

from blip2_actor.config import EngineConfig
from blip2_actor.engine.core import EngineCore
from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.memory import MAX_ENCODE_BATCH
from blip2_actor.engine.own_process import CANNOT_BE_SENT
from blip2_actor.engine.refusal import RequestRefused
from blip2_actor.engine.request_state import NOT_FINITE, RequestState
from blip2_actor.engine.startup import StartedModel, start_model
from blip2_actor.options import GenerationOptions
from blip2_actor.request import EngineStats, Features, ImageLike, Request, Result, Score, TextFeatures
from blip2_actor.status import Status

OnText = Callable[[str], None]


class Engine:
    """A loaded model that batches requests continuously. Close it, or use it as a context manager.

    The token ids of a request do not depend on the requests that run next to it. An engine that nobody holds
    any longer closes itself. It belongs to the process that built it.

    Example:
        >>> engine = Engine(EngineConfig(model="demo", device="cpu"))
        >>> engine.generate([Request(image=picture)])[0].text
        'a red circle on a white background'
        >>> "".join(engine.stream(Request(image=picture)))
        'a red circle on a white background'
        >>> shared = engine.image(picture)  # encoded once for all requests that use it
        >>> red, blue = engine.score([shared, shared], ["a red circle", "a blue square"])
        >>> red.logprob > blue.logprob
        True
        >>> engine.close()
    """

    def __init__(self, config: EngineConfig) -> None:
        """Load the weights and start the engine's thread.

        Raises:
            ValueError: the configuration or the checkpoint cannot be run; the message names the field.
            OSError: the checkpoint cannot be found or read.
        """
        self.config = config

        def start(num_threads: int) -> StartedModel:
            return start_model(
                model=config.model,
                revision=config.revision,
                adapter=config.adapter,
                device=config.device,
                dtype=config.dtype,
                num_threads=num_threads,
                max_slots=config.max_slots,
                encode_batch=config.encode_batch,
                compile=config.compile,
                device_map=config.device_map,
                skip_self_test=config.skip_self_test,
                skip_cuda_graphs=config.skip_cuda_graphs,
                ignore_generation_config=config.ignore_generation_config,
                image_size_px=config.image_size_px,
            )

        self._core = EngineCore(start, config.num_threads)
        # An engine that nobody holds any longer ends its thread; at exit, the core does that by itself.
        weakref.finalize(self, self._core.release).atexit = False
        started = self._core.started
        self._input_processor = started.input_processor
        self.model = started.runner.model
        self.prompts = started.input_processor.prompts
        self.image_size_px = started.input_processor.image_size_px
        self.self_test = started.self_test

    # Texts ----------------------------------------------------------------------------------------------

    def generate(
        self, requests: Sequence[Request], options: GenerationOptions = GenerationOptions()
    ) -> list[Result]:
        """Serve a list of requests and wait for them.

        Args:
            options: used by requests that have none of their own. Options that are not given are those of the
                checkpoint's `generation_config.json`, or else the defaults.

        Returns:
            One result per request, in order. A bad image or prompt is a result with a status.
        """
        self._core.require_caller_may_wait()
        futures = self._submit([(request, options, None) for request in requests])
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def submit(self, request: Request, options: GenerationOptions = GenerationOptions()) -> Future[Result]:
        """Queue one request from any thread. Cancelling the future frees its slots.

        Raises:
            RuntimeError: the engine is closed, or has failed.
        """
        return self._submit([(request, options, None)])[0]

    def stream(
        self, request: Request, options: GenerationOptions = GenerationOptions()
    ) -> Generator[str, None, None]:
        """Yield the text in pieces as its tokens come. Closing the generator cancels the request.

        Raises:
            ValueError: the request asks for several beams or texts, or was refused.
        """
        self._core.require_caller_may_wait()
        chosen = self._input_processor.resolve(request.options or options)
        if chosen.num_beams > 1 or chosen.num_return_sequences > 1:
            raise ValueError("num_beams and num_return_sequences must be 1 to stream, a stream is one text")
        texts: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        (future,) = self._submit([(request, chosen, texts.put)])
        future.add_done_callback(lambda _: texts.put(None))
        sent = ""
        try:
            while (text := texts.get()) is not None:
                if text.startswith(sent) and text != sent:
                    yield text[len(sent) :]
                    sent = text
            result = future.result()
            if result.text is None:
                raise ValueError(result.error)
            if result.text.startswith(sent) and result.text != sent:
                yield result.text[len(sent) :]
        finally:
            future.cancel()

    def _submit(
        self, asked: Sequence[tuple[Request, GenerationOptions, OnText | None]]
    ) -> list[Future[Result]]:
        """Queue requests in groups of one encode batch, so that the first group starts while the next is
        prepared."""
        self._core.require_own_process()
        futures: list[Future[Result]] = []
        try:
            for start in range(0, len(asked), MAX_ENCODE_BATCH):
                group = asked[start : start + MAX_ENCODE_BATCH]
                states: list[RequestState] = []
                for request, options, on_text in group:
                    try:
                        states.append(self._input_processor.request_state(request, options, on_text))
                        futures.append(states[-1].future)
                    except RequestRefused as refusal:
                        futures.append(Future())
                        futures[-1].set_result(Result(status=refusal.status, error=str(refusal)))
                self._core.enqueue(states, num_requests=len(group))
        except BaseException:  # the caller never learns of the futures that are queued
            for future in futures:
                future.cancel()
            raise
        return futures

    # Images ---------------------------------------------------------------------------------------------

    def image(self, image: ImageLike) -> EncodedImage:
        """Return an image that several requests can share: it is encoded once, as long as it is held.

        Raises:
            ValueError: the image cannot be read.
        """
        self._core.require_own_process()
        return self._input_processor.image(image)

    def features(
        self,
        images: Sequence[ImageLike],
        with_image_embeds: bool = False,
        with_attention_maps: bool = False,
    ) -> list[Features]:
        """Return what the encoders compute of images, in order; a bad image is an entry with a status.

        Args:
            images: as in `Request.image`.
            with_image_embeds: also return the output of the vision encoder.
            with_attention_maps: also return the weights of the Q-Former's cross-attentions.
        """
        return [
            Features(status=image.status, error=str(image))
            if isinstance(image, RequestRefused)
            else self._features(image, with_image_embeds, with_attention_maps)
            for image in self._encode(images, with_image_embeds or with_attention_maps)
        ]

    def _features(self, image: EncodedImage, with_image_embeds: bool, with_attention_maps: bool) -> Features:
        qformer_features, pooler_output = _to_numpy(image.qformer_features), _to_numpy(image.pooler_output)
        if not all(np.isfinite(x).all() for x in (qformer_features, pooler_output) if x is not None):
            return Features(status=Status.FAILED, error=NOT_FINITE)
        attention_maps = partial(self._core.runner.attention_maps, image)
        return Features(
            qformer_features=qformer_features,
            pooler_output=pooler_output,
            image_embeds=_to_numpy(image.image_embeds) if with_image_embeds else None,
            attention_maps=self._core.call(attention_maps) if with_attention_maps else None,
        )

    def text_features(self, texts: Sequence[str]) -> list[TextFeatures]:
        """Return texts without an image as the language model (for T5: its encoder) reads them.

        A text that is empty or too long is an entry with a status.
        """
        prepared = [self._input_processor.text_without_image(text) for text in texts]
        served = [ids for ids in prepared if not isinstance(ids, RequestRefused)]
        features = iter(self._core.call(lambda: self._core.runner.text_features(served)))
        return [
            TextFeatures(status=ids.status, error=str(ids))
            if isinstance(ids, RequestRefused)
            else TextFeatures(features=_to_numpy(next(features)))
            for ids in prepared
        ]

    def score(
        self,
        images: Sequence[ImageLike],
        texts: Sequence[str],
        prompts: Sequence[str | None] | None = None,
    ) -> list[Score]:
        """Return how probable each text is after its image (and prompt), the end token included.

        A bad image or text is an entry with a status. An image of `image()` that is scored with several
        texts is encoded once.
        """
        prompts = [None] * len(texts) if prompts is None else prompts
        if not len(images) == len(texts) == len(prompts):
            raise ValueError(
                f"texts and prompts must be one per image ({len(images)}), got {len(texts)}, {len(prompts)}"
            )
        prepared = [
            image
            if isinstance(image, RequestRefused)
            else self._input_processor.text_to_score(image, prompt, text)
            for image, text, prompt in zip(self._encode(images), texts, prompts, strict=True)
        ]
        served = [row for row in prepared if not isinstance(row, RequestRefused)]
        logprobs = iter(self._core.call(lambda: self._core.runner.text_logprobs(served)))
        return [
            Score(status=row.status, error=str(row))
            if isinstance(row, RequestRefused)
            else _score(next(logprobs))
            for row in prepared
        ]

    def _encode(
        self, images: Sequence[ImageLike], with_image_embeds: bool = False
    ) -> list[EncodedImage | RequestRefused]:
        """Run images through the encoders, in batches with whatever else is running."""
        self._core.require_caller_may_wait()
        encoded: list[EncodedImage | RequestRefused] = []
        for image in images:
            try:
                shared = self._input_processor.image(image)
                if with_image_embeds:
                    shared.keeps_image_embeds = True
                encoded.append(shared)
            except RequestRefused as refusal:
                encoded.append(refusal)
        states = [RequestState(image) for image in encoded if isinstance(image, EncodedImage)]
        self._core.enqueue(states)
        for state in states:
            state.future.result()
        return encoded

    # The engine itself ----------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Return counters since the start; cheap, from any thread."""
        return self._core.stats()

    def close(self) -> None:
        """Finish what was accepted, refuse everything else, and end the thread."""
        self._core.close()

    def __enter__(self) -> Engine:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(CANNOT_BE_SENT)

    def __exit__(self, *_: object) -> None:
        self.close()


def _score(logprobs: list[float]) -> Score:
    total = sum(logprobs)
    if not math.isfinite(total):
        return Score(status=Status.FAILED, error=NOT_FINITE)
    return Score(logprob=total, num_tokens=len(logprobs))


def _to_numpy(tensor: Tensor | None) -> np.ndarray | None:
    """Copy a tensor; on a CPU the array would otherwise share the engine's memory, and keep a whole batch."""
    return None if tensor is None else tensor.float().cpu().numpy().copy()
