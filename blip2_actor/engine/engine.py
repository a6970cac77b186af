"""The engine: requests in from any thread, results out; one thread drives the scheduler.

`generate` and `stream` are thin shells over `submit`. Two hosts use this class through `Blip2Actor`.
"""

from __future__ import annotations

import atexit
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from blip2_actor.checkpoints.checkpoint import Checkpoint, resolve
from blip2_actor.checkpoints.download import CACHE_FOLDER
from blip2_actor.checkpoints.loading import load_model
from blip2_actor.checkpoints.tokenizer import PromptTokenizer
from blip2_actor.config import EngineConfig
from blip2_actor.device import prepare_device, resolve_compile, resolve_device, resolve_dtype
from blip2_actor.engine import self_test as self_test
from blip2_actor.engine.cuda_graphs import capturer_for
from blip2_actor.engine.encode_worker import EncodeWorker
from blip2_actor.engine.input_processor import InputProcessor, RequestRefused
from blip2_actor.engine.memory import MAX_ENCODE_BATCH, size_engine
from blip2_actor.engine.model_runner import ModelRunner
from blip2_actor.engine.request_state import NO_NUMBERS, EncodedImage, RequestState, Task
from blip2_actor.engine.scheduler import Scheduler
from blip2_actor.models.layers import pack_for_cpu
from blip2_actor.options import GenerationOptions
from blip2_actor.request import EngineStats, Features, ImageLike, Request, Result, Score, TextFeatures
from blip2_actor.status import Status

T = TypeVar("T")


class Engine:
    """A loaded model that batches continuously. Close it, or use it as a context manager."""

    def __init__(self, config: EngineConfig) -> None:
        """Load the weights and start the engine's thread.

        Raises:
            ValueError: the configuration or the checkpoint cannot be run; the field is named.
            OSError: the checkpoint cannot be found or read.
        """
        self.config = config
        # Asked of the caller's thread: a new one gets what some engine's thread has set last.
        self._num_threads = config.num_threads or torch.get_num_threads()
        self._arrived: deque[RequestState | Task] = deque()
        self._unfinished: dict[Future[Any], RequestState | Task] = {}
        self._wake = threading.Condition()
        self._is_closed = False
        self._failure: BaseException | None = None
        self._num_requests = 0
        self._busy_s = 0.0
        loaded: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(loaded,), name="blip2-engine", daemon=True)
        self._thread.start()
        try:
            loaded.result()
        except BaseException:  # who is interrupted while it loads has no engine to close
            with self._wake:
                self._is_closed = True
            raise
        atexit.register(self._abandon)

    def _load(self) -> None:
        config = self.config
        device = resolve_device(config.device)
        prepare_device(device)
        checkpoint = resolve(config.model, config.revision)
        self.model = load_model(checkpoint, device, resolve_dtype(config.dtype, device), config.device_map)
        is_compiled = resolve_compile(config.compile, config.device_map, device)
        if device.type == "cpu" and not is_compiled and config.device_map is None:
            pack_for_cpu(self.model)
        self.prompts = PromptTokenizer(checkpoint.folder, checkpoint.config)
        self.image_size_px: int = checkpoint.config.vision_config.image_size
        is_plain = device.type == "cpu" and config.device_map is None and not is_compiled
        has_encode_worker = is_plain and self._num_threads > 1
        sizes = size_engine(
            self.model, config.max_slots, config.encode_batch, num_passes=1 + has_encode_worker
        )
        self.encode_batch, max_slots = sizes.encode_batch, sizes.max_slots
        self._input_processor = InputProcessor(self.model, self.prompts, self.image_size_px, max_slots)
        compiled_batch = self.encode_batch if is_compiled else None
        has_graphs = not config.skip_cuda_graphs and config.device_map is None
        capturer = capturer_for(device, has_graphs)
        self._runner = ModelRunner(self.model, max_slots, compiled_batch, capturer)
        self.self_test = self._run_self_test(checkpoint, max_slots)
        self._encode_worker = (
            EncodeWorker(self._runner, self._num_threads, self._notice) if has_encode_worker else None
        )
        self._scheduler = Scheduler(self._runner, max_slots, self.encode_batch, self._encode_worker)

    def _run_self_test(self, checkpoint: Checkpoint, max_slots: int) -> self_test.SelfTestRecord | None:
        if self.config.skip_self_test or max_slots < self_test.NUM_IMAGES:
            return None
        record = self_test.check(self._runner, self.prompts.empty_ids, self.image_size_px)
        self_test.compare_with_last(record, CACHE_FOLDER / "self_test", checkpoint.digest(), self.model.dtype)
        return record

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
        return self._input_processor.image(image)

    def features(
        self,
        images: Sequence[ImageLike],
        with_image_embeds: bool = False,
        with_attention_maps: bool = False,
    ) -> list[Features]:
        """What the encoders make of images, in order; a bad image is an entry with a status.

        Args:
            images: as in `Request.image`.
            with_image_embeds: also return the vision encoder's own output.
            with_attention_maps: also return the weights of the Q-Former's cross-attentions.
        """
        found: list[Features] = []
        for encoded in self._encode(images, with_image_embeds or with_attention_maps):
            if isinstance(encoded, RequestRefused):
                found.append(Features(status=encoded.status, error=str(encoded)))
            else:
                found.append(self._features(encoded, with_image_embeds, with_attention_maps))
        return found

    def _features(
        self, encoded: EncodedImage, with_image_embeds: bool, with_attention_maps: bool
    ) -> Features:
        qformer_features, pooler_output = (
            _to_numpy(encoded.qformer_features),
            _to_numpy(encoded.pooler_output),
        )
        if not all(
            np.isfinite(found).all() for found in (qformer_features, pooler_output) if found is not None
        ):
            return Features(status=Status.FAILED, error=NO_NUMBERS)
        look = partial(self._runner.attention_maps, encoded)
        return Features(
            qformer_features=qformer_features,
            pooler_output=pooler_output,
            image_embeds=_to_numpy(encoded.image_embeds) if with_image_embeds else None,
            attention_maps=self._call(look) if with_attention_maps else None,
        )

    def text_features(self, texts: Sequence[str]) -> list[TextFeatures]:
        """Texts without an image, as the language model (T5: its encoder) reads them.

        A text that is empty or too long is an entry with a status.
        """
        asked = [self._input_processor.text_alone(text) for text in texts]
        served = [ids for ids in asked if not isinstance(ids, RequestRefused)]
        features = iter(self._call(lambda: self._runner.text_features(served)))
        return [
            TextFeatures(status=ids.status, error=str(ids))
            if isinstance(ids, RequestRefused)
            else TextFeatures(features=_to_numpy(next(features)))
            for ids in asked
        ]

    def score(
        self,
        images: Sequence[ImageLike],
        texts: Sequence[str],
        prompts: Sequence[str | None] | None = None,
    ) -> list[Score]:
        """How probable each text is behind its image (and prompt), the end token included.

        A bad image or text is an entry with a status. An image of `image()` that is scored with several
        texts is encoded once.
        """
        prompts = [None] * len(texts) if prompts is None else prompts
        if not len(images) == len(texts) == len(prompts):
            raise ValueError(
                f"texts and prompts must be one per image ({len(images)}), got {len(texts)}, {len(prompts)}"
            )
        asked: list[tuple[EncodedImage, list[int], list[int]] | RequestRefused] = []
        for encoded, text, prompt in zip(self._encode(images), texts, prompts, strict=True):
            asked.append(
                encoded
                if isinstance(encoded, RequestRefused)
                else self._input_processor.text(encoded, prompt, text)
            )
        served = [row for row in asked if not isinstance(row, RequestRefused)]
        logprobs = iter(self._call(lambda: self._runner.text_logprobs(served)))
        return [
            Score(status=row.status, error=str(row))
            if isinstance(row, RequestRefused)
            else _score(next(logprobs))
            for row in asked
        ]

    def _encode(
        self, images: Sequence[ImageLike], with_image_embeds: bool = False
    ) -> list[EncodedImage | RequestRefused]:
        """Bring images through the encoder, batched with whatever else is running."""
        encoded: list[EncodedImage | RequestRefused] = []
        for image in images:
            try:
                found = self._input_processor.image(image)
                if with_image_embeds:
                    found.keeps_image_embeds = True
                encoded.append(found)
            except RequestRefused as refusal:
                encoded.append(refusal)
        jobs = [RequestState(image) for image in encoded if isinstance(image, EncodedImage)]
        self._enqueue(jobs)
        for job in jobs:
            job.future.result()
        return encoded

    def _call(self, work: Callable[[], T]) -> T:
        """Have the engine's thread compute something between two steps, and wait for it."""
        task = Task(work)
        self._enqueue([task])
        return task.future.result()

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
        atexit.unregister(self._abandon)

    def _abandon(self) -> None:
        """At the interpreter's end: a thread that is still computing then would abort the process."""
        for future in list(self._unfinished):
            future.cancel()
        self.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The engine's thread --------------------------------------------------------------------------------

    def _submit(
        self, asked: Sequence[tuple[Request, GenerationOptions, Callable[[str], None] | None]]
    ) -> list[Future[Result]]:
        """Queue requests in groups that can be encoded together; the first is begun while others are read."""
        futures: list[Future[Result]] = []
        try:
            for start in range(0, len(asked), MAX_ENCODE_BATCH):
                group = asked[start : start + MAX_ENCODE_BATCH]
                jobs: list[RequestState] = []
                for request, options, on_text in group:
                    try:
                        jobs.append(self._input_processor.job(request, options, on_text))
                        futures.append(jobs[-1].future)
                    except RequestRefused as refusal:
                        futures.append(Future())
                        futures[-1].set_result(Result(status=refusal.status, error=str(refusal)))
                self._enqueue(jobs, num_requests=len(group))
        except BaseException:  # nobody else knows of those that are queued
            for future in futures:
                future.cancel()
            raise
        return futures

    def _enqueue(self, jobs: Sequence[RequestState | Task], num_requests: int = 0) -> None:
        with self._wake:
            if self._failure is not None:
                raise RuntimeError("the engine has failed, build it anew") from self._failure
            if self._is_closed:
                raise RuntimeError("the engine is closed")
            self._num_requests += num_requests
            self._arrived.extend(jobs)
            self._unfinished.update({job.future: job for job in jobs})
            self._wake.notify()
        for job in jobs:
            job.future.add_done_callback(self._forget)

    def _forget(self, future: Future[Any]) -> None:
        # By future: one that held on to its job would keep an image's tensors until garbage is collected.
        self._unfinished.pop(future, None)

    def _run(self, loaded: Future[None]) -> None:
        """Everything that computes runs here, loading and scoring too; but for the lane, which encodes.

        OpenMP gives each thread that computes a pool of its own, and lets all of them sleep between two
        operations once there are more than cores: one thread too many would halve the speed of a small model.
        """
        try:
            torch.get_num_threads()  # at the first question torch sets a thread up, which undid the next line
            torch.set_num_threads(self._num_threads)
            self._load()
        except BaseException as error:
            loaded.set_exception(error)
            return
        loaded.set_result(None)
        try:
            while self._take_arrivals():
                started = time.perf_counter()
                self._scheduler.step()
                self._busy_s += time.perf_counter() - started
        except BaseException as error:
            # Whatever broke the device broke every request; the host decides whether the process lives on.
            with self._wake:
                self._failure = error
            for job in list(self._unfinished.values()):
                if not job.future.done() or job.future.cancelled():
                    job.fail(error)
        finally:
            if self._encode_worker is not None:
                self._encode_worker.close()

    def _notice(self) -> None:
        """The lane has something to take."""
        with self._wake:
            self._wake.notify()

    def _take_arrivals(self) -> bool:
        """Wait until there is something to do; False when closed and done."""
        tasks = []
        with self._wake:
            self._wake.wait_for(
                lambda: (
                    self._arrived
                    or self._scheduler.can_step
                    or (self._is_closed and not self._scheduler.has_work)
                )
            )
            while self._arrived:
                arrival = self._arrived.popleft()
                if isinstance(arrival, Task):
                    tasks.append(arrival)
                else:
                    self._scheduler.add(arrival)
        for task in tasks:
            task.run()
        with self._wake:
            return bool(self._arrived) or self._scheduler.has_work or not self._is_closed


def _score(logprobs: list[float]) -> Score:
    total = sum(logprobs)
    if not math.isfinite(total):
        return Score(status=Status.FAILED, error=NO_NUMBERS)
    return Score(logprob=total, num_tokens=len(logprobs))


def _to_numpy(tensor: Tensor | None) -> np.ndarray | None:
    """A copy: on a CPU the array would share the engine's memory, and keep a whole batch."""
    return None if tensor is None else tensor.float().cpu().numpy().copy()
