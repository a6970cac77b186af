"""Replayed decode steps, in fixed shapes on fixed buffers, give what steps of exactly the right size give."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from blip2_actor import Engine, EngineConfig, GenerationOptions, Request
from blip2_actor.checkpoints.checkpoint import resolve
from blip2_actor.checkpoints.loading import load_model
from blip2_actor.engine.cuda_graphs import CudaGraphs, round_rows
from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.model_runner import ModelRunner
from blip2_actor.engine.request_state import RequestState
from blip2_actor.models.blip2 import Blip2
from blip2_actor.models.kv_cache import ALIGNMENT, KVCache
from blip2_actor.testing.tiny_checkpoints import images
from tests.parity.engine.tape import Tape

NUM_SLOTS = 11
PROMPT_LENGTHS = [1, 4, 1, 2, 9, 1, 3]


@pytest.fixture(scope="module", params=["opt", "t5"])
def model(request: pytest.FixtureRequest, checkpoint_folder: Callable[..., Path]) -> Blip2:
    return load_model(resolve(str(checkpoint_folder(request.param))), torch.device("cpu"), torch.float32)


def make_jobs(prompt_lengths: list[int], max_new_tokens: int = 20) -> list[RequestState]:
    pictures = images(len(prompt_lengths), seed=len(prompt_lengths)).numpy()
    return [
        RequestState(
            EncodedImage(picture), [7 + i] * length, GenerationOptions(max_new_tokens=max_new_tokens)
        )
        for i, (picture, length) in enumerate(zip(pictures, prompt_lengths, strict=True))
    ]


class Pair:
    """The same work on two runners: one replays, one does not."""

    def __init__(self, model: Blip2) -> None:
        self.tape = Tape()
        self.plain = ModelRunner(model, NUM_SLOTS)
        self.replaying = ModelRunner(model, NUM_SLOTS, capturer=self.tape)
        self.lengths: list[int] = []

    def prefill(self, jobs: list[RequestState], slots: list[int]) -> None:
        self.plain.encode([job.image for job in jobs])
        for runner in (self.plain, self.replaying):
            runner.prefill(jobs, slots)
        self.lengths += [0] * (max(slots) + 1 - len(self.lengths))
        for job, slot in zip(jobs, slots, strict=True):
            self.lengths[slot] = self.plain.cached_length(job)

    def decode(self, steps: int) -> None:
        for step in range(steps):
            token_ids = [(3 * slot + step) % 200 + 8 for slot in range(len(self.lengths))]
            expected = self.plain.decode(token_ids, self.lengths)
            assert expected.isfinite().all()
            torch.testing.assert_close(
                self.replaying.decode(token_ids, self.lengths), expected, rtol=1e-5, atol=1e-5
            )
            self.lengths = [length + 1 for length in self.lengths]

    def move_last_to(self, slot: int) -> None:
        last = len(self.lengths) - 1
        for runner in (self.plain, self.replaying):
            runner.copy_slots([last], [slot], self.lengths[last])
        self.lengths[slot] = self.lengths.pop()

    def shrink(self, num_slots: int) -> None:
        for runner in (self.plain, self.replaying):
            runner.shrink(num_slots)
        self.lengths = []


def test_replayed_steps_give_the_logits_of_exact_ones(model: Blip2) -> None:
    """Idle rows must not disturb running ones, nor a slot that is filled later; a recording must see new
    lengths and new prefixes, and must not outlive the buffers it was made on."""
    pair = Pair(model)
    pair.prefill(make_jobs(PROMPT_LENGTHS), list(range(7)))
    pair.decode(5)
    pair.move_last_to(2)  # a text in the middle has ended
    pair.decode(4)
    pair.prefill(make_jobs([2, 5]), [6, 7])  # slots that idle rows have written to
    pair.decode(3)
    assert pair.tape.num_captured >= 1
    pair.prefill(make_jobs([3], max_new_tokens=50), [6])  # all slots grow
    pair.decode(4)
    pair.shrink(5)
    pair.prefill(make_jobs([1, 1, 1, 1, 1]), [0, 1, 2, 3, 4])
    pair.decode(6)


def test_a_recording_follows_prefixes_that_change_under_it(model: Blip2) -> None:
    """Equal rows and reach, but other prefixes: a mask or a reach baked in would show the wrong ones."""
    pair = Pair(model)
    for prompt_lengths in (
        [3, 3, 3, 3],
        [3, 3, 3, 3],
        [3, 1, 2, 3],
        [1, 3, 3, 2],
        [2, 2, 2, 2],
        [3, 1, 3, 3],
    ):
        pair.lengths = []
        pair.prefill(make_jobs(prompt_lengths), [0, 1, 2, 3])
        pair.decode(3)


def test_masks_of_a_step_begin_at_aligned_rows(model: Blip2, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's attention copies any other mask, in every layer of every step."""
    attend, strides = KVCache.attend, []

    def noted(self: KVCache, layer: int, query: Tensor, kv_len: int, *others: Any) -> Tensor:
        mask = others[1]
        assert mask.shape[-1] == kv_len
        strides.append(mask.stride())
        return attend(self, layer, query, kv_len, *others)

    monkeypatch.setattr(KVCache, "attend", noted)
    runner = ModelRunner(model, NUM_SLOTS)
    jobs = make_jobs([2, 4, 2])  # unequal, so that the cross-attention has a mask too
    runner.encode([job.image for job in jobs])
    runner.prefill(jobs, [0, 1, 2])
    longest = max(runner.cached_length(job) for job in jobs)
    for kv_len in range(longest + 1, longest + 9):
        runner.decode([9] * len(jobs), [kv_len - 1] * len(jobs))
    assert all(last == 1 for *_, last in strides)
    assert not [found for found in strides if any(stride % ALIGNMENT for stride in found[:-1])]


def test_the_recording_that_is_in_use_is_not_the_one_that_goes(
    model: Blip2, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first shape recorded is often the busiest: recording it again and again costs ten steps each."""
    monkeypatch.setattr("blip2_actor.engine.cuda_graphs.MAX_GRAPHS", 2)
    pair = Pair(model)
    pair.prefill(make_jobs([1] * 7), list(range(7)))
    for rows in (1, 1, 2, 2, 1, 4, 4, 1):
        pair.replaying.decode([9] * rows, pair.lengths[:rows])
    assert pair.tape.num_captured == 3


def test_rows_round_up_to_few_sizes() -> None:
    sizes = [round_rows(count) for count in range(1, 513)]
    assert all(size >= count for count, size in enumerate(sizes, start=1))
    assert sizes[:5] == [1, 2, 4, 4, 8]
    assert len(set(sizes)) == 21


@pytest.fixture(params=["opt", "t5"])
def folder(request: pytest.FixtureRequest, checkpoint_folder: Callable[..., Path]) -> Path:
    return checkpoint_folder(request.param)


def make_engine(folder: Path) -> Engine:
    config = EngineConfig(
        model=str(folder), dtype="float32", device="cpu", num_threads=1, max_slots=13, encode_batch=4
    )
    return Engine(config)


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tape]:
    """Engines replay as they do on a GPU."""
    tape = Tape()
    monkeypatch.setattr("blip2_actor.engine.startup.capturer_for", lambda *_, **__: tape)
    yield tape


def make_requests() -> list[Request]:
    choose = random.Random(5)
    return [
        Request(
            image=picture.numpy(),
            prompt=choose.choice([None, "a", "what is it?"]),
            options=GenerationOptions(
                max_new_tokens=choose.randint(1, 30), num_beams=choose.choice([1, 1, 1, 3])
            ),
        )
        for picture in images(24, seed=2)
    ]


def served(engine: Engine) -> list[tuple[int, ...]]:
    """In two waves, so that texts arrive while others run, the second wave longer than the slots are."""
    first, second = make_requests()[:14], make_requests()[14:]
    futures = [engine.submit(request) for request in first]
    futures[3].result(timeout=60)
    futures += [engine.submit(request) for request in second]
    long = GenerationOptions(max_new_tokens=40, min_new_tokens=40)
    futures.append(engine.submit(Request(image=images(1)[0].numpy()), long))
    return [future.result(timeout=60).token_ids for future in futures]


def test_an_engine_that_replays_gives_the_same_tokens(folder: Path, tape: Tape, monkeypatch) -> None:
    with make_engine(folder) as engine:
        replayed = served(engine)
    assert tape.num_captured > 3
    monkeypatch.undo()
    with make_engine(folder) as engine:
        assert served(engine) == replayed


def test_steps_that_cannot_be_recorded_run_all_the_same(
    folder: Path, tape: Tape, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A driver or an operation that refuses must cost speed, not captions; and not a line per step."""

    def refuse(step: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(tape, "capture", refuse)
    with caplog.at_level(logging.WARNING), make_engine(folder) as engine:
        found = served(engine)
    assert sum("could not be captured" in record.message for record in caplog.records) == 1
    monkeypatch.undo()
    with make_engine(folder) as engine:
        assert served(engine) == found


@pytest.mark.parametrize("num_failures", [1, 1000])
def test_out_of_memory_while_recording_costs_no_slots(
    checkpoint_folder: Callable[..., Path],
    tape: Tape,
    monkeypatch,
    caplog: pytest.LogCaptureFixture,
    num_failures: int,
) -> None:
    """A recording's allocations cannot be served from what is cached, so a step may fit that its recording
    does not: it is recorded once more when the cache is empty, and runs as it is where that fails too."""
    folder, capture = checkpoint_folder("opt"), tape.capture
    emptied: list[int] = []
    failures: list[Callable[[], None]] = []

    def fail(step: Callable[[], None]) -> Callable[[], None]:
        if len(failures) < num_failures:
            failures.append(step)
            raise torch.OutOfMemoryError("recording")
        return capture(step)

    with caplog.at_level(logging.WARNING), make_engine(folder) as engine:
        monkeypatch.setattr(tape, "capture", fail)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(failures)))
        recorded = tape.num_captured
        replayed = served(engine)
        assert engine._core.scheduler.limits.max_slots == 13
    if num_failures == 1:
        assert emptied == [1]
        assert tape.num_captured > recorded
    else:
        assert emptied == list(range(1, len(failures), 2))  # behind every first try, and only there
        assert tape.num_captured == recorded
        assert "was not captured" in caplog.text
    monkeypatch.undo()
    with make_engine(folder) as engine:
        assert served(engine) == replayed


def test_out_of_memory_in_the_step_itself_halves_the_slots(
    checkpoint_folder: Callable[..., Path], tape: Tape, monkeypatch
) -> None:
    """Neither recorded nor as it is: fewer texts at once are all that helps."""
    folder, failures = checkpoint_folder("opt"), [torch.OutOfMemoryError("step")] * 3
    with make_engine(folder) as engine:
        capture, decode = tape.capture, engine.model.language_model.decode

        def fail_twice(step: Callable[[], None]) -> Callable[[], None]:
            if len(failures) > 1:
                raise failures.pop()
            return capture(step)

        def fail_then(*step: Any) -> torch.Tensor:
            if len(failures) == 1:
                raise failures.pop()
            return decode(*step)

        monkeypatch.setattr(tape, "capture", fail_twice)
        monkeypatch.setattr(engine.model.language_model, "decode", fail_then)
        replayed = served(engine)
        assert engine._core.scheduler.limits.max_slots == 6
    monkeypatch.undo()
    with make_engine(folder) as engine:
        assert served(engine) == replayed


class BrokenGraph:
    """A CUDA graph whose capture the driver has given up."""

    def capture_begin(self, **_: object) -> None:
        pass

    def capture_end(self) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("recording")])
def test_a_recording_that_cannot_be_ended_gives_the_allocator_back(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    """Else all memory of the thread would go on coming from a pool that nobody keeps, and the next
    `empty_cache` would fail; and the step's own error says whether memory is short."""
    pools, ended = iter([(0, 1), (0, 2)]), []
    stream = SimpleNamespace(device=None, device_index=3, wait_stream=lambda _: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", BrokenGraph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *x: ended.append(x), raising=False)
    capturer, calls = CudaGraphs(torch.device("cuda", 3)), []

    def step() -> None:
        calls.append(None)
        if error is not None and len(calls) == 2:
            raise error

    with pytest.raises(RuntimeError, match=str(error or "previous error")):
        capturer.capture(step)
    assert ended == [(3, (0, 1))]
    assert capturer._pool == (0, 2)
