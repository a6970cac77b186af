"""Encoding in two threads on a CPU: shared fairly, nothing forgotten, the cores divided."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from blip2_actor import Engine, EngineConfig, GenerationOptions, Request
from blip2_actor.jobs import EncodedImage
from tests.parity.tiny import images


@pytest.fixture
def engine(checkpoint_folder: Callable[..., Path]) -> Iterator[Engine]:
    config = EngineConfig(
        model=str(checkpoint_folder("opt")),
        dtype="float32",
        device="cpu",
        num_threads=2,
        max_slots=4,
        encode_batch=4,
    )
    with Engine(config) as started:
        yield started


Pass = tuple[str, int, int]
"""Thread, images and the thread's share of the cores."""


def watch_passes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Pass]:
    real, seen = engine._runner.encode, []

    def encode(batch: list[EncodedImage]) -> None:
        seen.append((threading.current_thread().name, len(batch), torch.get_num_threads()))
        real(batch)

    monkeypatch.setattr(engine._runner, "encode", encode)
    return seen


def requests(count: int) -> list[Request]:
    return [Request(image=image.numpy()) for image in images(count)]


def test_both_threads_encode_each_with_half_of_the_cores(engine, monkeypatch) -> None:
    """Two threads with all cores each would keep each other from computing."""
    passes = watch_passes(engine, monkeypatch)
    results = engine.generate(requests(24), GenerationOptions(max_new_tokens=3))
    assert all(result.text is not None for result in results)
    assert {name for name, *_ in passes} == {"blip2-engine", "blip2-encode"}
    assert {cores for *_, cores in passes} == {1}
    assert sum(count for _, count, _ in passes) == 24
    assert engine.stats().num_images_encoded == 24


def test_one_image_alone_has_all_cores(engine, monkeypatch) -> None:
    """Who waits for one caption would wait nearly twice as long; and the cores must come back."""
    engine.generate(requests(12), GenerationOptions(max_new_tokens=3))
    passes = watch_passes(engine, monkeypatch)
    engine.generate(requests(1))
    assert passes == [("blip2-engine", 1, 2)]


def test_a_few_images_are_divided(engine, monkeypatch) -> None:
    """One thread with all of them would leave half of the cores idle."""
    passes = watch_passes(engine, monkeypatch)
    engine.generate(requests(4))
    assert sorted((name, count) for name, count, _ in passes) == [("blip2-encode", 2), ("blip2-engine", 2)]


def test_what_is_asked_of_an_image_while_it_is_encoded_is_not_forgotten(engine, monkeypatch) -> None:
    """Its pass began without keeping the vision encoder's output: without a second one there is none."""
    real, begun, asked = engine._runner.encode, threading.Event(), threading.Event()

    def encode(batch: list[EncodedImage]) -> None:
        is_first = not begun.is_set()
        before = [image.keeps_image_embeds for image in batch]
        begun.set()
        if is_first:
            for image in batch:
                image.keeps_image_embeds = False
            real(batch)
            assert asked.wait(30)
            for image, keeps in zip(batch, before, strict=True):
                image.keeps_image_embeds |= keeps
        else:
            real(batch)

    monkeypatch.setattr(engine._runner, "encode", encode)
    shared = engine.image(images(1)[0].numpy())
    caption = engine.submit(Request(image=shared))
    assert begun.wait(30)
    found: list[object] = []
    asking = threading.Thread(target=lambda: found.extend(engine.features([shared], with_image_embeds=True)))
    asking.start()
    while not shared.keeps_image_embeds:
        pass
    asked.set()
    asking.join(30)
    assert found[0].image_embeds is not None
    assert caption.result(30).text is not None


def test_closing_finishes_what_the_lane_holds(engine) -> None:
    futures = [engine.submit(request) for request in requests(20)]
    engine.close()
    assert all(future.result(0).text is not None for future in futures)
