"""An engine of stated cost without a model: `FakeEngineConfig` builds it, and workers import no torch.

A caption is a digest of the pixels (and the prompt), so that every test knows the right answer for
every row and a mix-up of rows shows. What the engine did is left in a trace folder, so that tests
in other processes count captions instead of guessing from time.
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
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
)
from blip2_actor.status import Status

MAX_LETTERS = 100
"""Longer texts are refused by `score`."""
VISION_WIDTH, QFORMER_WIDTH, NUM_QUERIES = 5, 3, 2


class DeviceFault(RuntimeError):
    """What an engine raises when its device is gone."""


@dataclass(frozen=True, kw_only=True)
class FakeEngineConfig:
    """A picklable recipe, like `EngineConfig`."""

    model: str = "fake"
    image_size_px: int = 32
    dtype: str = "float32"
    """"auto" is bfloat16 where Ray has given an accelerator."""
    seconds_per_batch: float = 0.0
    seconds_per_image: float = 0.0
    max_batch: int = 64
    trace: str | None = None
    """Folder that gets one line per caption made, a file per engine."""
    gate: str | None = None
    """While this file exists, no caption is finished: tests hold the job at a known point."""
    gate_after: int = 0
    """Captions an engine makes before it heeds the gate."""
    fails_to_build: str | None = None
    """What an engine that cannot be built says."""
    opens_gate_at: int | None = None
    """Requests that must have arrived for the engine to remove the gate by itself."""
    holds_on: tuple[str, ...] = ()
    """Captions (digests) that wait for the gate, and no others."""
    kills_on: tuple[str, ...] = ()
    """Captions (digests) on which the process dies by SIGKILL."""
    kills_once: str | None = None
    """File: the process dies by SIGKILL at its first caption unless the file exists, and creates it."""
    faults_on: tuple[str, ...] = ()
    """Captions (digests) on which the engine raises a device fault."""
    refuses_on: tuple[str, ...] = ()
    """Captions (digests) that end with status `refused`."""

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


def fake_caption(pixels: np.ndarray, prompt: str | None = None) -> str:
    """The right answer for uint8[H, W, 3]."""
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()[:16]
    return f"{prompt} {digest}" if prompt else digest


def fake_features(pixels: np.ndarray) -> Features:
    """The right vectors for uint8[H, W, 3]."""
    seed = int.from_bytes(hashlib.sha256(pixels.tobytes()).digest()[:8])
    random = np.random.default_rng(seed)
    return Features(
        pooler_output=random.random(VISION_WIDTH, np.float32),
        qformer_features=random.random((NUM_QUERIES, QFORMER_WIDTH), np.float32),
    )


def fake_score(pixels: np.ndarray, text: str, prompt: str | None = None) -> float:
    """The right score."""
    digest = hashlib.sha256(f"{fake_caption(pixels, prompt)} {text}".encode()).digest()
    return -digest[0] / 256


class FakeEngine:
    """One thread that takes what waits, up to max_batch, and sleeps what it costs."""

    def __init__(self, config: FakeEngineConfig) -> None:
        self._config = config
        self._queue: queue.SimpleQueue[tuple[Request, GenerationOptions, Future[Result]] | None] = (
            queue.SimpleQueue()
        )
        self._num_requests = self._num_finished = self._num_batches = self._num_encoded = 0
        self._encoded: weakref.WeakSet[EncodedImage] = weakref.WeakSet()
        self._busy_s = 0.0
        self._trace = None
        if config.trace:
            folder = Path(config.trace)
            folder.mkdir(parents=True, exist_ok=True)
            self._trace = (folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.log").open("a", buffering=1)
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, options: GenerationOptions = GenerationOptions()) -> Future[Result]:
        future: Future[Result] = Future()
        self._num_requests += 1
        if self._config.gate and self._num_requests == self._config.opens_gate_at:
            os.remove(self._config.gate)
        self._queue.put((request, options, future))
        return future

    def generate(
        self, requests: Sequence[Request], options: GenerationOptions = GenerationOptions()
    ) -> list[Result]:
        return [future.result() for future in [self.submit(request, options) for request in requests]]

    def stream(
        self, request: Request, options: GenerationOptions = GenerationOptions()
    ) -> Generator[str, None, None]:
        yield self.submit(request, options).result().text or ""

    def image(self, image: ImageLike) -> EncodedImage:
        return image if isinstance(image, EncodedImage) else EncodedImage(np.asarray(image))

    def features(self, images: Sequence[Any], with_image_embeds: bool = False) -> list[Features]:
        return [fake_features(self._encode(image)) for image in images]

    def score(
        self, images: Sequence[Any], texts: Sequence[str], prompts: Sequence[str | None] | None = None
    ) -> list[Score]:
        prompts = [None] * len(texts) if prompts is None else prompts
        return [
            Score(status=Status.REFUSED, error="text is too long")
            if len(text) > MAX_LETTERS
            else Score(logprob=fake_score(self._encode(image), text, prompt), num_tokens=1)
            for image, text, prompt in zip(images, texts, prompts, strict=True)
        ]

    def _encode(self, image: Any) -> np.ndarray:
        """Count an image, a shared one once, and give its pixels."""
        if isinstance(image, EncodedImage):
            self._num_encoded += image not in self._encoded
            self._encoded.add(image)
            return image.pixels
        self._num_encoded += 1
        return np.asarray(image)

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
            for request, options, future in work:
                if future.set_running_or_notify_cancel():
                    self._finish(request, request.options or options, future)
            self._num_batches += bool(work)
            self._busy_s += time.perf_counter() - started
            if None in batch:
                return

    def _finish(self, request: Request, options: GenerationOptions, future: Future[Result]) -> None:
        config = self._config
        pixels = self._encode(request.image)
        # As a model under penalties would: it no longer says the prompt.
        caption = fake_caption(pixels, request.prompt if options.repetition_penalty == 1 else None)
        if caption in config.holds_on or (not config.holds_on and self._num_finished >= config.gate_after):
            while config.gate and os.path.exists(config.gate):
                time.sleep(0.01)
        if config.kills_once and not os.path.exists(config.kills_once):
            Path(config.kills_once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if caption in config.kills_on:
            os.kill(os.getpid(), signal.SIGKILL)
        self._num_finished += 1
        if self._trace:
            self._trace.write(f"{caption}\n")
        if caption in config.faults_on:
            future.set_exception(DeviceFault("the device is gone"))
        elif caption in config.refuses_on:
            future.set_result(Result(status=Status.REFUSED, error="the fake engine was told to refuse it"))
        else:
            texts = [caption, *(f"{caption} {n}" for n in range(1, options.num_return_sequences))]
            future.set_result(
                Result(
                    completions=tuple(
                        Completion(text=text, token_ids=(1, 2, 3), logprob=-1.5, finish_reason="stop")
                        for text in texts
                    )
                )
            )


def captions_made(trace: str | os.PathLike[str]) -> list[str]:
    """Every caption that any engine with this trace folder has made, repeated ones too."""
    return [line for file in sorted(Path(trace).glob("*.log")) for line in file.read_text().splitlines()]
