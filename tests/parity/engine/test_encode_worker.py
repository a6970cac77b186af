"""Encoding ahead: in a second thread with half of the cores on a CPU, or on a second stream of a GPU."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from blip2_actor import Engine, EngineConfig, Features, GenerationOptions, Request
from blip2_actor.engine import memory
from blip2_actor.engine.core import Task
from blip2_actor.engine.encode_stream import EncodeStream
from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.model_runner import ModelRunner
from blip2_actor.testing import random_images
from tests.engines import cpu_config


@pytest.fixture
def is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the tiny model use the cores as a large one does."""
    monkeypatch.setattr(memory, "SMALL_MODEL_ELEMENTS", 0)


@pytest.fixture
def engine(is_large: None, checkpoint_folder: Callable[..., Path]) -> Iterator[Engine]:
    config = cpu_config(checkpoint_folder("opt"), num_threads=2, max_slots=4, encode_batch=4)
    with Engine(config) as started:
        yield started


Pass = tuple[str, int, int]
"""For each pass: the name of its thread, the number of images, and the number of cores."""


def watch_passes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Pass]:
    real, seen = engine._core.runner.encode, []

    def encode(batch: list[EncodedImage]) -> None:
        seen.append((threading.current_thread().name, len(batch), torch.get_num_threads()))
        real(batch)

    monkeypatch.setattr(engine._core.runner, "encode", encode)
    return seen


def requests(count: int) -> list[Request]:
    return [Request(image=image.numpy()) for image in random_images(count)]


def test_both_threads_encode_each_with_half_of_the_cores(engine, monkeypatch) -> None:
    """Two threads that use all cores each would slow each other down."""
    passes = watch_passes(engine, monkeypatch)
    results = engine.generate(requests(24), GenerationOptions(max_new_tokens=3))
    assert all(result.text is not None for result in results)
    assert {name for name, *_ in passes} == {"blip2-engine", "blip2-encode"}
    assert {cores for *_, cores in passes} == {1}
    assert sum(count for _, count, _ in passes) == 24
    assert engine.stats().num_images_encoded == 24


def test_one_image_alone_has_all_cores(engine, monkeypatch) -> None:
    """With half of the cores a single caption takes nearly twice as long, so the engine's thread must get
    them back."""
    engine.generate(requests(12), GenerationOptions(max_new_tokens=3))
    passes = watch_passes(engine, monkeypatch)
    engine.generate(requests(1))
    assert passes == [("blip2-engine", 1, 2)]


def test_one_image_alone_has_one_core_in_a_small_model(engine, monkeypatch) -> None:
    """Waking the other cores takes longer than an operation, and would happen hundreds of times."""
    monkeypatch.undo()  # undoes `is_large`
    with Engine(engine.config) as small:
        small.generate(requests(12), GenerationOptions(max_new_tokens=3))
        passes = watch_passes(small, monkeypatch)
        small.generate(requests(1))
    assert passes == [("blip2-engine", 1, 1)]


def test_a_few_images_are_divided(engine, monkeypatch) -> None:
    """If one thread took all of them, half of the cores would be idle."""
    passes = watch_passes(engine, monkeypatch)
    engine.generate(requests(4))
    assert sorted((name, count) for name, count, _ in passes) == [("blip2-encode", 2), ("blip2-engine", 2)]


def hold_worker(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Hold back finished passes of the worker until the second event; the first event says that there is
    one."""
    real, begun, go_on = engine._core.runner.encode, threading.Event(), threading.Event()

    def encode(batch: list[EncodedImage]) -> None:
        real(batch)
        if threading.current_thread().name == "blip2-encode":
            begun.set()
            assert go_on.wait(30)

    monkeypatch.setattr(engine._core.runner, "encode", encode)
    return begun, go_on


def test_image_embeds_that_are_requested_during_a_pass_are_not_forgotten(engine, monkeypatch) -> None:
    """A second pass is needed, because the first began without keeping the vision encoder's output."""
    begun, go_on = hold_worker(engine, monkeypatch)
    shared = [engine.image(image.numpy()) for image in random_images(2)]
    captions = engine._submit([(Request(image=image), GenerationOptions(), None) for image in shared])
    assert begun.wait(30)
    found: list[Features] = []
    asking = threading.Thread(target=lambda: found.extend(engine.features(shared, with_image_embeds=True)))
    asking.start()
    while not all(image.keeps_image_embeds for image in shared):
        time.sleep(0.001)
    go_on.set()
    asking.join(30)
    assert [features.image_embeds is not None for features in found] == [True, True]
    assert all(caption.result(30).text is not None for caption in captions)


def test_the_engine_serves_others_while_only_the_worker_is_busy(engine, monkeypatch) -> None:
    """A pass of a large model takes seconds; texts and new images must not wait for it."""
    begun, go_on = hold_worker(engine, monkeypatch)
    futures = [engine.submit(request) for request in requests(4)]
    assert begun.wait(30)
    assert engine.text_features(["a"])[0].features is not None
    assert engine.submit(requests(5)[4]).result(30).text is not None
    assert not all(future.done() for future in futures)
    go_on.set()
    assert all(future.result(30).text is not None for future in futures)


def test_closing_finishes_what_the_worker_holds(engine, monkeypatch) -> None:
    begun, go_on = hold_worker(engine, monkeypatch)
    futures = [engine.submit(request, GenerationOptions(max_new_tokens=1)) for request in requests(20)]
    assert begun.wait(30)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._core.is_closed:
        time.sleep(0.001)
    go_on.set()
    closing.join(30)
    assert all(future.result(0).text is not None for future in futures)


def test_a_worker_that_fails_fails_every_request(engine, monkeypatch) -> None:
    """The error is raised in the worker's thread, where nobody would see it."""
    real = engine._core.runner.encode

    def broken(batch: list[EncodedImage]) -> None:
        if threading.current_thread().name == "blip2-encode":
            raise RuntimeError("the device fell off")
        real(batch)

    monkeypatch.setattr(engine._core.runner, "encode", broken)
    with pytest.raises(RuntimeError, match="fell off"):
        engine.generate(requests(16))


def test_the_next_engine_has_all_cores_again(engine, checkpoint_folder, monkeypatch) -> None:
    """torch gives a new thread the number that any thread set last, here the worker's half."""
    engine.close()
    folder = checkpoint_folder("opt")
    found: list[int] = []

    def build() -> None:
        found.append(torch.get_num_threads())
        with Engine(EngineConfig(model=str(folder), dtype="float32", device="cpu", max_slots=4)) as second:
            passes = watch_passes(second, monkeypatch)
            second.generate(requests(1))
            found.append(passes[0][2])

    building = threading.Thread(target=build)
    building.start()
    building.join(60)
    assert found == [2, 2]


class SlowStream(EncodeStream):
    """A stream on a CPU that finishes batches at random times, although `take` may ask for them earlier."""

    def __init__(self, runner: ModelRunner, *_: object) -> None:
        super().__init__(runner)
        self.random = random.Random(0)
        self.num_unencoded_images = 0

    @property
    def is_done(self) -> bool:
        return super().is_done and self.random.random() < 0.3

    def give(self, images: list[EncodedImage]) -> None:
        super().give(images)
        self.num_unencoded_images += sum(not image.is_encoded for image in images)

    def close(self) -> None:
        """`EncodeWorker` has this method; a stream has no thread to end."""


@pytest.fixture
def stream_config(checkpoint_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    """An engine that encodes on a `SlowStream`."""
    monkeypatch.setattr("blip2_actor.engine.core.EncodeWorker", SlowStream)
    return cpu_config(checkpoint_folder("opt"), num_threads=2, max_slots=6, encode_batch=4)


def test_a_stream_gives_the_same_tokens_as_no_stream(stream_config: EngineConfig) -> None:
    """More images than slots, of two priorities, one of them shared by two requests."""
    options = [GenerationOptions(max_new_tokens=1 + 5 * i % 13) for i in range(40)]
    found = []
    for config in (replace(stream_config, num_threads=1), stream_config):
        with Engine(config) as engine:
            pictures = [image.numpy() for image in random_images(40)]
            shared = engine.image(pictures[0])
            asked = [
                Request(image=picture, options=own, low_priority=i % 3 == 0)
                for i, (picture, own) in enumerate(zip(pictures, options, strict=True))
            ]
            asked += [Request(image=shared), Request(image=shared, prompt="a")]
            futures = [engine.submit(request) for request in asked]
            found.append([future.result(30).token_ids for future in futures])
            stream = engine._core._encode_worker
    assert found[0] == found[1]
    assert isinstance(stream, SlowStream)
    assert stream.num_unencoded_images == 41, "an image counts as encoded only when it is taken"


def test_memory_that_is_short_when_a_batch_is_taken_loses_no_request(stream_config, monkeypatch) -> None:
    """Wanted image embeddings are copied at that point."""
    with Engine(stream_config) as engine:
        real, times = engine._core.runner.store, iter(range(100))

        def store(*batch: Any) -> None:
            if next(times) == 0:
                raise torch.OutOfMemoryError("no memory for a copy")
            real(*batch)

        monkeypatch.setattr(engine._core.runner, "store", store)
        futures = [engine.submit(request) for request in requests(8)]
        assert all(future.result(30).text is not None for future in futures)


def test_an_image_of_two_priorities_is_not_queued_again_once_it_is_served(stream_config, monkeypatch) -> None:
    """The image is in two batches; the first succeeds, and the second runs out of memory."""
    with Engine(replace(stream_config, encode_batch=2)) as engine:
        begin = threading.Event()
        engine._core.enqueue([Task(lambda: begin.wait(30))])
        shared = engine.image(random_images(1)[0].numpy())
        others = [Request(image=image.numpy()) for image in random_images(2, seed=1)]
        asked = [Request(image=shared), others[0], Request(image=shared, low_priority=True), others[1]]
        asked[3] = replace(others[1], low_priority=True)
        futures = [engine.submit(request) for request in asked]
        real, times = engine._core.runner.run_encoders, iter(range(100))

        def run_encoders(images: Sequence[EncodedImage]) -> Any:
            if next(times) == 1:
                raise torch.OutOfMemoryError("no memory for a second batch")
            return real(images)

        monkeypatch.setattr(engine._core.runner, "run_encoders", run_encoders)
        begin.set()
        assert all(future.result(30).text is not None for future in futures)
