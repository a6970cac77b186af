"""The engine: requests in from any thread, results out; one thread drives the scheduler.

`generate` and `stream` are thin shells over `submit`. Two hosts use this class through `Blip2Actor`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict

import numpy as np
import torch

from blip2_actor.beam import BeamSearch
from blip2_actor.checkpoint import resolve
from blip2_actor.config import EngineConfig
from blip2_actor.device import resolve_device, resolve_dtype
from blip2_actor.jobs import EncodedImage, Job
from blip2_actor.loading import load_model
from blip2_actor.options import GenerationOptions
from blip2_actor.preprocess import decode_image, resize_image
from blip2_actor.prompts import Prompts
from blip2_actor.request import EngineStats, ImageLike, Request, Result
from blip2_actor.runner import ModelRunner
from blip2_actor.scheduler import Scheduler
from blip2_actor.search import TextSearch
from blip2_actor.status import Status

DEFAULT_ENCODE_BATCH = {"cpu": 16, "cuda": 64}
DEFAULT_MAX_SLOTS = {"cpu": 128, "cuda": 256}


class Engine:
    """A loaded model that batches continuously. Close it, or use it as a context manager."""

    def __init__(self, config: EngineConfig) -> None:
        """Load the weights and start the engine's thread.

        Raises:
            ValueError: the configuration or the checkpoint cannot be run; the field is named.
            OSError: the checkpoint cannot be found or read.
        """
        device = resolve_device(config.device)
        checkpoint = resolve(config.model, config.revision)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self.config = config
        self.model = load_model(checkpoint, device, resolve_dtype(config, device))
        self.prompts = Prompts(checkpoint.folder, checkpoint.config)
        self.image_size_px: int = checkpoint.config.vision_config.image_size
        max_slots = config.max_slots or DEFAULT_MAX_SLOTS.get(device.type, 32)
        encode_batch = config.encode_batch or DEFAULT_ENCODE_BATCH.get(device.type, 16)
        self._scheduler = Scheduler(ModelRunner(self.model, max_slots), max_slots, encode_batch)
        self._arrived: deque[Job] = deque()
        self._wake = threading.Condition()
        self._is_closed = False
        self._failure: BaseException | None = None
        self._num_requests = 0
        self._busy_s = 0.0
        self._thread = threading.Thread(target=self._run, name="blip2-engine", daemon=True)
        self._thread.start()

    # Requests -------------------------------------------------------------------------------------------

    def generate(
        self, requests: Sequence[Request], options: GenerationOptions = GenerationOptions()
    ) -> list[Result]:
        """Serve a list of requests, in order.

        A request's own options win over `options`. A bad image or prompt is a result with a status.
        """
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

    def stream(self, request: Request, options: GenerationOptions = GenerationOptions()) -> Iterator[str]:
        """Yield the text in pieces, as its tokens come; closing the iterator cancels the request.

        Raises:
            ValueError: the request has several beams or texts, or was refused.
        """
        chosen = request.options or options
        if chosen.num_beams > 1 or chosen.num_return_sequences > 1:
            raise ValueError("num_beams and num_return_sequences must be 1 to stream, a stream is one text")
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        (future,) = self._submit([(request, chosen, pieces.put)])
        future.add_done_callback(lambda _: pieces.put(None))
        sent = ""
        try:
            while (text := pieces.get()) is not None:
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

    def image(self, image: ImageLike) -> EncodedImage:
        """Make an image that several requests can share: it is encoded once, as long as this is held.

        Raises:
            ValueError: the image cannot be read.
        """
        return EncodedImage(self._pixels(image))

    def stats(self) -> EngineStats:
        """Counters since the start; cheap, from any thread."""
        scheduler = self._scheduler
        return EngineStats(
            **asdict(scheduler.counters),
            num_requests=self._num_requests,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting + len(self._arrived),
            busy_s=self._busy_s,
        )

    def close(self) -> None:
        """Finish what was accepted, refuse what comes, end the thread."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # From a request to a job ----------------------------------------------------------------------------

    def _submit(
        self, asked: Sequence[tuple[Request, GenerationOptions, Callable[[str], None] | None]]
    ) -> list[Future[Result]]:
        """Queue requests together, so that they are encoded together."""
        jobs: list[Job] = []
        futures: list[Future[Result]] = []
        for request, options, on_text in asked:
            try:
                jobs.append(self._make_job(request, options, on_text))
                futures.append(jobs[-1].future)
            except _Refusal as refusal:
                futures.append(Future())
                futures[-1].set_result(Result(status=refusal.status, error=str(refusal)))
        with self._wake:
            if self._is_closed or self._failure is not None:
                raise RuntimeError("the engine is closed") from self._failure
            self._num_requests += len(asked)
            self._arrived.extend(jobs)
            self._wake.notify()
        return futures

    def _make_job(
        self, request: Request, options: GenerationOptions, on_text: Callable[[str], None] | None
    ) -> Job:
        image = request.image
        encoded = image if isinstance(image, EncodedImage) else EncodedImage(self._pixels(image))
        try:
            prompt_ids = self.prompts.encode(request.prompt)
        except ValueError as error:
            raise _Refusal(Status.REFUSED, str(error)) from error
        options = request.options or options
        self._check_fits(prompt_ids, options)
        context = self.model.context_ids(prompt_ids)
        searches: list[TextSearch | BeamSearch]
        if options.num_beams > 1:
            searches = [BeamSearch(options, context, self.prompts)]
        else:
            on_token = None if on_text is None else self._text_sender(on_text, options.stop)
            count = options.num_return_sequences
            seeds = range(options.seed, options.seed + count) if options.do_sample else [None]
            searches = [TextSearch(options, context, self.prompts, seed, on_token) for seed in seeds]
        return Job(encoded, prompt_ids, options, searches)

    def _pixels(self, image: ImageLike) -> np.ndarray:
        """uint8[S, S, 3], whatever the request held."""
        if isinstance(image, bytes):
            decoded = decode_image(image, self.image_size_px)
            if decoded.status is not Status.OK:
                raise _Refusal(decoded.status, decoded.error or decoded.status)
            return decoded.array(self.image_size_px)
        try:
            return resize_image(image, self.image_size_px)
        except ValueError as error:
            raise _Refusal(Status.UNDECODABLE, str(error)) from error

    def _check_fits(self, prompt_ids: list[int], options: GenerationOptions) -> None:
        limit = self.model.language_model.max_positions
        needed = self.model.config.num_query_tokens + len(prompt_ids) + options.max_new_tokens
        if limit is not None and needed > limit:
            raise _Refusal(
                Status.REFUSED,
                f"prompt must leave room for max_new_tokens in the model's {limit} positions, got "
                f"{len(prompt_ids)} prompt tokens and {options.max_new_tokens} new tokens; shorten either",
            )
        slots = max(options.num_beams, options.num_return_sequences)
        if slots > self._scheduler.max_slots:
            raise _Refusal(
                Status.REFUSED,
                f"num_beams and num_return_sequences must be at most {self._scheduler.max_slots}, "
                f"got {slots}; raise max_slots",
            )

    def _text_sender(
        self, on_text: Callable[[str], None], stop: Sequence[str]
    ) -> Callable[[Sequence[int]], None]:
        def send(token_ids: Sequence[int]) -> None:
            on_text(_settled(self.prompts.decode(token_ids), stop))

        return send

    # The engine's thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        if self.config.num_threads is not None:
            torch.set_num_threads(self.config.num_threads)  # OpenMP keeps this number per thread
        try:
            while self._take_arrivals():
                started = time.perf_counter()
                self._scheduler.step()
                self._busy_s += time.perf_counter() - started
        except BaseException as error:
            # Whatever broke the device broke every request; the host decides whether the process lives on.
            with self._wake:
                self._failure = error
                unfinished = [*self._scheduler.jobs(), *self._arrived]
            for job in unfinished:
                job.fail(error)

    def _take_arrivals(self) -> bool:
        """Wait until there is something to do; False when closed and done."""
        with self._wake:
            self._wake.wait_for(lambda: self._arrived or self._scheduler.has_work or self._is_closed)
            while self._arrived:
                self._scheduler.add(self._arrived.popleft())
            return self._scheduler.has_work


class _Refusal(ValueError):
    """A request that cannot be served; its status and why."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


def _settled(text: str, stop: Sequence[str]) -> str:
    """The part of a growing text that later tokens will not change: no cut character, no begun stop text."""
    text = text.rstrip("\ufffd")
    begun = (n for s in stop for n in range(min(len(s), len(text)), 0, -1) if text.endswith(s[:n]))
    longest = max(begun, default=0)
    return text[: len(text) - longest].rstrip()
