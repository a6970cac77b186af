"""Memory runs out at a bad moment: nothing hangs, no other request is lost, and a failed start says why."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from blip2_actor import Engine, GenerationOptions, Request, Result, Status
from blip2_actor.engine import scheduler
from blip2_actor.engine.out_of_memory import ShrinkingBatches
from blip2_actor.engine.self_test import check
from blip2_actor.testing import random_images
from tests.engines import cpu_config

LONG = GenerationOptions(max_new_tokens=12, min_new_tokens=12)
WIDE = GenerationOptions(max_new_tokens=4, num_beams=8)


@pytest.fixture(params=["opt", "t5"])
def engine(request: pytest.FixtureRequest, checkpoint_folder: Callable[..., Path]) -> Iterator[Engine]:
    config = cpu_config(checkpoint_folder(request.param), max_slots=8, encode_batch=4)
    with config.build() as started:
        yield started


def out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("not enough")


def tokens(results: list[Result]) -> list[tuple[int, ...]]:
    return [result.token_ids for result in results]


def fail_once(monkeypatch: pytest.MonkeyPatch, place: object, name: str) -> list[bool]:
    """Make the first call run out of memory; the returned list is empty until then."""
    real = getattr(place, name)
    called: list[bool] = []

    def first_fails(*args: object) -> object:
        if not called:
            called.append(True)
            out_of_memory()
        return real(*args)

    monkeypatch.setattr(place, name, first_fails)
    return called


def test_a_captured_pass_is_forgotten_when_its_batches_come_no_more(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [Request(image=image.numpy()) for image in random_images(4)]
    expected = engine.generate(pictures, LONG)
    runner, forgotten = engine._core.runner, []
    fail_once(monkeypatch, runner, "encode")
    monkeypatch.setattr(runner.encoders, "forget", lambda: forgotten.append(True))
    assert tokens(engine.generate(pictures, LONG)) == tokens(expected)
    assert forgotten == [True]


def test_a_request_wider_than_what_is_left_fails_and_blocks_nobody(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait forever for slots, and all later requests behind it, whether its image is still to be
    encoded or arrives later."""
    pictures = [image.numpy() for image in random_images(6)]
    expected = engine.generate([Request(image=picture) for picture in pictures], LONG)
    fail_once(monkeypatch, engine._core.runner, "decode")
    narrow = [Request(image=picture, options=LONG) for picture in pictures]
    wide = Request(image=pictures[0], options=WIDE)
    *found, refused = [f.result(timeout=30) for f in [engine.submit(r) for r in [*narrow, wide]]]
    assert tokens(found) == tokens(expected)
    late = engine.submit(wide).result(timeout=30)
    for result in (refused, late):
        assert result.status is Status.FAILED
        assert "must be at most 4, got 8; lower them" in str(result.error)
    assert engine.submit(narrow[0]).result(timeout=30).token_ids == expected[0].token_ids


@pytest.mark.parametrize("place", ["copy_slots", "copy_positions", "advance"])
def test_memory_that_runs_out_between_two_passes_does_not_end_the_engine(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Copies between slots and the selection of tokens need memory too."""
    pictures = [image.numpy() for image in random_images(6)]
    lengths = [3, 12, 5, 12, 8, 12]
    requests = [
        Request(
            image=picture, options=GenerationOptions(max_new_tokens=n, min_new_tokens=n, num_beams=n % 3 + 1)
        )
        for picture, n in zip(pictures, lengths, strict=True)
    ]
    expected = engine.generate(requests)
    called = fail_once(monkeypatch, scheduler if place == "advance" else engine._core.runner, place)
    assert tokens(engine.generate(requests)) == tokens(expected)
    assert called
    assert engine._core.scheduler.limits.max_slots == 4


def test_batches_are_halved_until_one_item_alone_does_not_fit() -> None:
    sizes: list[int] = []

    def work(items: list[str]) -> list[str]:
        sizes.append(len(items))
        if "large" in items:
            out_of_memory()
        if "wrong" in items:
            raise RuntimeError("of another kind")
        return items

    batches = ShrinkingBatches(4, "texts")
    with pytest.raises(RuntimeError, match="of another kind"):
        batches.run(work, ["a", "b", "wrong"])
    with pytest.raises(torch.OutOfMemoryError):
        batches.run(work, ["a", "b", "large"])
    assert sizes == [3, 3, 2, 1, 1]


@pytest.mark.parametrize("stage", ["encode", "prefill", "decode"])
def test_what_does_not_fit_even_alone_fails_alone(
    checkpoint_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """There is one slot, and not enough memory for its text; the engine must still serve the next request."""
    folder = checkpoint_folder("opt")
    config = cpu_config(folder, max_slots=1, encode_batch=1)
    with config.build() as engine:
        first, second = [Request(image=image.numpy(), options=LONG) for image in random_images(2)]
        expected = engine.generate([second])
        fail_once(monkeypatch, engine._core.runner, stage)
        refused, served = engine.generate([first, second])
        assert refused.status is Status.FAILED
        assert refused.error == "out of memory: not enough"
        assert served.token_ids == expected[0].token_ids
        assert engine.generate([first])[0].ok


def test_slots_are_freed_before_half_as_many_are_allocated(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory has just run out, so the memory of the failed pass and of the old slots must be free by then."""
    held: list[weakref.ref] = []
    alive: list[list[bool]] = []
    runner, real_shrink = engine._core.runner, engine._core.runner.shrink

    def failing_pass(*_: object) -> None:
        working_memory = torch.zeros(10)
        held.extend([weakref.ref(working_memory), weakref.ref(runner.slots)])
        out_of_memory()

    def shrink(num_slots: int) -> None:
        before = held[0]() is not None
        monkeypatch.undo()
        real_shrink(num_slots)
        alive.append([before, held[1]() is not None])

    monkeypatch.setattr(runner, "decode", failing_pass)
    monkeypatch.setattr(runner, "shrink", shrink)
    assert engine.generate([Request(image=random_images(1)[0].numpy())], LONG)[0].ok
    assert alive == [[False, False]]
    assert runner.slots.num_slots == 4


def test_a_full_batch_that_does_not_fit_does_not_keep_the_engine_from_starting(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The self-test fills a compiled batch, but only the scheduler halves batches."""
    runner, real = engine._core.runner, engine._core.runner.encode
    monkeypatch.setattr(runner.encoders, "compiled_batch", 16)
    monkeypatch.setattr(runner, "encode", lambda x: out_of_memory() if len(x) > 4 else real(x))
    assert check(runner, engine.prompts.empty_ids, engine.image_size_px) == engine.self_test


def test_no_memory_at_start_names_what_to_lower(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine._core.runner, "prefill", out_of_memory)
    with pytest.raises(ValueError, match=r"got 8 texts at once and not enough; lower --max-slots"):
        check(engine._core.runner, engine.prompts.empty_ids, engine.image_size_px)
