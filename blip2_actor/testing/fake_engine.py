"""An engine without a model, for tests and benchmarks of everything around the engine.

`FakeEngineConfig` is its recipe and says what the engine costs (seconds per batch and per image) and how it
fails: it can wait at a gate file, kill its process, report a lost device, hang, or refuse a request. Its
answers are in `fake_answers`. It records every caption in a trace folder, so that a test in another process
counts captions instead of guessing from the time. It imports no torch, so that Ray starts workers quickly.
"""

from __future__ import annotations

import hashlib
import os
import queue
import signal
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import numpy as np

from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.options import GenerationOptions
from blip2_actor.request import (
    Completion,
    EngineStats,
    Features,
    ImageLike,
    ModelInfo,
    Request,
    Result,
    Score,
    StepWatcher,
)
from blip2_actor.status import Status
from blip2_actor.testing.fake_answers import (
    NUM_QUERIES,
    QFORMER_WIDTH,
    VISION_WIDTH,
    fake_caption,
    fake_features,
    fake_score,
)

OnText = Callable[[str], None]
_Maps = bool | str
_Work = tuple[Request, GenerationOptions, OnText | None, Future[Result]]

MAX_SCORED_CHARS = 100
"""`score` refuses longer texts."""


class DeviceFault(RuntimeError):
    """The error that an engine raises when its device is lost."""


@dataclass(frozen=True, kw_only=True)
class FakeEngineConfig:
    """A picklable recipe for a `FakeEngine`; an `EngineBuilder`, as `EngineConfig` is.

    Several fields name captions; a caption is what `fake_caption` returns.
    """

    model: str = "fake"
    """Any name; `info` raises for "unknown"."""
    image_size_px: int = 32
    dtype: str = "float32"
    """Dtype to report; "auto" is bfloat16 when Ray has assigned an accelerator, else float32."""
    seconds_per_batch: float = 0.0
    seconds_per_image: float = 0.0
    max_batch: int = 64
    """Maximum number of requests that the engine takes at once."""
    trace: str | None = None
    """Folder for the trace: one file per engine, one line per caption."""
    gate: str | None = None
    """While this file exists, no caption is finished, so that a test can hold a job at a known point."""
    gate_after: int = 0
    """Number of captions that an engine finishes before it waits at the gate."""
    fails_to_build: str | None = None
    """If given, `build` raises ValueError with this message."""
    opens_gate_at: int | None = None
    """Number of requests after which the engine removes the gate file itself."""
    holds_on: tuple[str, ...] = ()
    """Captions that wait at the gate; if given, no other captions wait."""
    kills_on: tuple[str, ...] = ()
    """Captions on which the process is killed by SIGKILL."""
    faults_on: tuple[str, ...] = ()
    """Captions on which the engine raises `DeviceFault`."""
    hangs_on_device: str | None = None
    """Number of the accelerator, as CUDA_VISIBLE_DEVICES has it, on which the engine stops for good at any
    caption, as a lost device does."""
    refuses_on: tuple[str, ...] = ()
    """Captions whose result has the status `refused`."""

    def info(self) -> ModelInfo:
        if self.model == "unknown":
            raise ValueError("model must be known, got 'unknown'; name a folder or use demo")
        return ModelInfo(
            model=self.model,
            image_size_px=self.image_size_px,
            dtype=self._resolved_dtype,
            digest=hashlib.sha256(self.model.encode()).hexdigest(),
            vision_width=VISION_WIDTH,
            qformer_width=QFORMER_WIDTH,
            num_queries=NUM_QUERIES,
        )

    def check_prompts(self, prompts: Sequence[str], max_new_tokens: int) -> None:
        if "unservable" in prompts:
            raise ValueError("prompt must be servable, got 'unservable'")

    @property
    def _resolved_dtype(self) -> str:
        if self.dtype != "auto":
            return self.dtype
        return "bfloat16" if os.environ.get("CUDA_VISIBLE_DEVICES") else "float32"

    def build(self) -> FakeEngine:
        if self.fails_to_build:
            raise ValueError(self.fails_to_build)
        return FakeEngine(self)


class FakeDetokenizer:
    """Shows token ids as they are; they have nothing to do with the text."""

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return [f"<{token_id}>" for token_id in token_ids]


class FakeEngine:
    """One thread that takes the waiting requests, at most `max_batch` at once, and sleeps for their cost."""

    def __init__(self, config: FakeEngineConfig) -> None:
        self.prompts = FakeDetokenizer()
        self.step_watchers: list[StepWatcher] = []
        self._config = config
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._num_requests = self._num_finished = self._num_batches = self._num_encoded = 0
        self._encoded: weakref.WeakSet[EncodedImage] = weakref.WeakSet()
        self._busy_s = 0.0
        self._trace = _open_trace(config.trace) if config.trace else None
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        request: Request,
        options: GenerationOptions = GenerationOptions(),
        on_text: OnText | None = None,
    ) -> Future[Result]:
        future: Future[Result] = Future()
        self._num_requests += 1
        if self._config.gate and self._num_requests == self._config.opens_gate_at:
            os.remove(self._config.gate)
        owned = replace(request, image=self.image(request.image))  # the caller may overwrite its array now
        self._queue.put((owned, (request.options or options).resolve(), on_text, future))
        return future

    def generate(
        self, requests: Sequence[Request], options: GenerationOptions = GenerationOptions()
    ) -> list[Result]:
        return [future.result() for future in [self.submit(request, options) for request in requests]]

    def stream(
        self, request: Request, options: GenerationOptions = GenerationOptions()
    ) -> Generator[str, None, None]:
        yield self.submit(request, options).result().text or ""

    def image(self, image: ImageLike | None) -> EncodedImage:
        return image if isinstance(image, EncodedImage) else EncodedImage(np.array(image))

    def features(
        self, images: Sequence[ImageLike], with_image_embeds: bool = False, with_attention_maps: _Maps = False
    ) -> list[Features]:
        return [fake_features(self._encode(image), bool(with_attention_maps)) for image in images]

    def score(
        self,
        images: Sequence[ImageLike],
        texts: Sequence[str],
        prompts: Sequence[str | None] | None = None,
    ) -> list[Score]:
        prompts = [None] * len(texts) if prompts is None else prompts
        return [
            Score(status=Status.REFUSED, error="text is too long")
            if len(text) > MAX_SCORED_CHARS
            else Score(logprob=fake_score(self._encode(image), text, prompt), num_tokens=1)
            for image, text, prompt in zip(images, texts, prompts, strict=True)
        ]

    def stats(self) -> EngineStats:
        return EngineStats(
            num_requests=self._num_requests,
            num_finished=self._num_finished,
            num_encode_calls=self._num_batches,
            num_images_encoded=self._num_encoded,
            num_waiting=self._num_requests - self._num_finished,
            busy_s=self._busy_s,
        )

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._trace:
            self._trace.close()

    def _encode(self, image: ImageLike | None) -> np.ndarray:
        """Count an image, a shared one only once, and return its pixels."""
        shared = self.image(image)
        self._num_encoded += shared not in self._encoded
        self._encoded.add(shared)
        return shared.pixels

    def _run(self) -> None:
        while True:
            batch = [self._queue.get()]
            while len(batch) < self._config.max_batch and not self._queue.empty():
                batch.append(self._queue.get())
            started = time.perf_counter()
            work = [item for item in batch if item is not None]
            cost_s = self._config.seconds_per_batch + self._config.seconds_per_image * len(work)
            if cost_s and work:
                time.sleep(cost_s)
            for request, options, on_text, future in work:
                if future.set_running_or_notify_cancel():
                    self._finish(request, options, on_text, future)
            self._num_batches += bool(work)
            seconds = time.perf_counter() - started
            self._busy_s += seconds
            for watch in self.step_watchers if work else ():
                watch(seconds, len(work), len(work))
            if None in batch:
                return

    def _finish(
        self, request: Request, options: GenerationOptions, on_text: OnText | None, future: Future[Result]
    ) -> None:
        config = self._config
        pixels = self._encode(request.image)
        # A model with a repetition penalty no longer repeats the prompt, and neither does this engine.
        caption = fake_caption(pixels, request.prompt if options.repetition_penalty == 1 else None)
        self._wait_at_gate(caption)
        self._die_if_told(caption)
        self._num_finished += 1
        if self._trace:
            self._trace.write(f"{caption}\n")
        if caption in config.faults_on:
            future.set_exception(DeviceFault("the device is gone"))
        elif caption in config.refuses_on:
            future.set_result(Result(status=Status.REFUSED, error="the fake engine was told to refuse it"))
        else:
            if on_text is not None and options.num_return_sequences == options.num_beams == 1:
                for end in range(4, len(caption), 4):
                    on_text(caption[:end])
            texts = [caption, *(f"{caption} {n}" for n in range(1, options.num_return_sequences))]
            future.set_result(Result(completions=tuple(map(_completion, texts)), num_prompt_tokens=1))

    def _wait_at_gate(self, caption: str) -> None:
        config = self._config
        if caption in config.holds_on or (not config.holds_on and self._num_finished >= config.gate_after):
            while config.gate and os.path.exists(config.gate):
                time.sleep(0.01)

    def _die_if_told(self, caption: str) -> None:
        config = self._config
        device = os.environ.get("CUDA_VISIBLE_DEVICES")
        if device and device == config.hangs_on_device:
            threading.Event().wait()
        if caption in config.kills_on:
            os.kill(os.getpid(), signal.SIGKILL)


def captions_made(trace: str | os.PathLike[str]) -> list[str]:
    """Return every caption that engines with this trace folder have made, repeated ones too."""
    return [line for file in sorted(Path(trace).glob("*.log")) for line in file.read_text().splitlines()]


def _open_trace(trace: str) -> TextIO:
    folder = Path(trace)
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.log").open("a", buffering=1)


def _completion(text: str) -> Completion:
    return Completion(
        text=text, token_ids=(1, 2, 3), logprob=-1.5, finish_reason="stop", token_logprobs=(-0.5,) * 3
    )
