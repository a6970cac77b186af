"""Replayed decode steps, with fixed shapes and buffers, give the same logits as eager steps of the exact
size."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blip2_actor import Engine, GenerationOptions, Request
from blip2_actor.checkpoints.checkpoint import resolve
from blip2_actor.checkpoints.loading import load_model
from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.encoders import Encoders
from blip2_actor.engine.model_runner import ModelRunner
from blip2_actor.engine.request_state import RequestState
from blip2_actor.models.blip2 import Blip2
from blip2_actor.models.kv_cache import ALIGNMENT, Attended, KVCache
from blip2_actor.testing import random_images
from tests.engines import cpu_config
from tests.parity.engine.tape import Tape

NUM_SLOTS = 11
PROMPT_LENGTHS = [1, 4, 1, 2, 9, 1, 3]


@pytest.fixture(scope="module", params=["opt", "t5"])
def model(request: pytest.FixtureRequest, checkpoint_folder: Callable[..., Path]) -> Blip2:
    return load_model(resolve(str(checkpoint_folder(request.param))), torch.device("cpu"), torch.float32)


def make_request_states(prompt_lengths: list[int], max_new_tokens: int = 20) -> list[RequestState]:
    pictures = random_images(len(prompt_lengths), seed=len(prompt_lengths)).numpy()
    return [
        RequestState(
            EncodedImage(picture),
            [7 + i] * length,
            GenerationOptions(max_new_tokens=max_new_tokens).resolve(),
        )
        for i, (picture, length) in enumerate(zip(pictures, prompt_lengths, strict=True))
    ]


class Pair:
    """The same work on two runners: one replays steps, and the other runs them eagerly."""

    def __init__(self, model: Blip2) -> None:
        self.tape = Tape()
        self.eager = ModelRunner(model, NUM_SLOTS)
        self.replaying = ModelRunner(model, NUM_SLOTS, capturer=self.tape)
        self.lengths: list[int] = []

    def prefill(self, requests: list[RequestState], slots: list[int]) -> None:
        self.eager.encode([request.image for request in requests])
        for runner in (self.eager, self.replaying):
            runner.prefill(requests, slots)
        self.lengths += [0] * (max(slots) + 1 - len(self.lengths))
        for request, slot in zip(requests, slots, strict=True):
            self.lengths[slot] = self.eager.cached_length(request)

    def decode(self, steps: int) -> None:
        for step in range(steps):
            token_ids = [(3 * slot + step) % 200 + 8 for slot in range(len(self.lengths))]
            expected = self.eager.decode(token_ids, self.lengths)
            assert expected.isfinite().all()
            torch.testing.assert_close(
                self.replaying.decode(token_ids, self.lengths), expected, rtol=1e-5, atol=1e-5
            )
            self.lengths = [length + 1 for length in self.lengths]

    def move_last_to(self, slot: int) -> None:
        last = len(self.lengths) - 1
        for runner in (self.eager, self.replaying):
            runner.copy_slots([last], [slot], self.lengths[last])
        self.lengths[slot] = self.lengths.pop()

    def shrink(self, num_slots: int) -> None:
        for runner in (self.eager, self.replaying):
            runner.shrink(num_slots)
        self.lengths = []


def test_replayed_steps_give_the_logits_of_eager_ones(model: Blip2) -> None:
    """Idle rows must not disturb running ones, nor a slot that is filled later. A graph must see new lengths
    and new prefixes, and must not be used after its buffers are gone."""
    pair = Pair(model)
    pair.prefill(make_request_states(PROMPT_LENGTHS), list(range(7)))
    pair.decode(5)
    pair.move_last_to(2)  # the text in the middle has ended
    pair.decode(4)
    pair.prefill(make_request_states([2, 5]), [6, 7])  # slots that idle rows have written to
    pair.decode(3)
    assert pair.tape.num_captured >= 1
    pair.prefill(make_request_states([3], max_new_tokens=50), [6])  # all slots grow
    pair.decode(4)
    pair.shrink(5)
    pair.prefill(make_request_states([1, 1, 1, 1, 1]), [0, 1, 2, 3, 4])
    pair.decode(6)


def test_a_graph_follows_prefixes_that_change(model: Blip2) -> None:
    """Rows and `kv_len` are equal but the prefixes differ: a mask fixed in the graph would show the wrong
    ones."""
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
        pair.prefill(make_request_states(prompt_lengths), [0, 1, 2, 3])
        pair.decode(3)


def test_masks_of_a_step_begin_at_aligned_rows(model: Blip2, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA attention copies every mask that is not aligned, in every layer of every step."""
    attend, strides = KVCache.attend, []

    def attend_and_note(self: KVCache, layer: int, query: Tensor, attended: Attended, *others: Any) -> Tensor:
        assert attended.mask is not None and attended.mask.shape[-1] == attended.kv_len
        strides.append(attended.mask.stride())
        return attend(self, layer, query, attended, *others)

    monkeypatch.setattr(KVCache, "attend", attend_and_note)
    runner = ModelRunner(model, NUM_SLOTS)
    requests = make_request_states([2, 4, 2])  # unequal, so that the cross-attention has a mask too
    runner.encode([request.image for request in requests])
    runner.prefill(requests, [0, 1, 2])
    longest = max(runner.cached_length(request) for request in requests)
    for kv_len in range(longest + 1, longest + 9):
        runner.decode([9] * len(requests), [kv_len - 1] * len(requests))
    assert all(last == 1 for *_, last in strides)
    assert not [found for found in strides if any(stride % ALIGNMENT for stride in found[:-1])]


def test_the_graph_that_is_dropped_is_the_least_recently_used(
    model: Blip2, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first shape that is captured is often the most used; each capture costs as much as ten steps."""
    monkeypatch.setattr("blip2_actor.engine.cuda_graphs.MAX_GRAPHS", 2)
    pair = Pair(model)
    pair.prefill(make_request_states([1] * 7), list(range(7)))
    for rows in (1, 1, 2, 2, 1, 4, 4, 1):
        pair.replaying.decode([9] * rows, pair.lengths[:rows])
    assert pair.tape.num_captured == 3


@pytest.fixture(params=["opt", "t5"])
def folder(request: pytest.FixtureRequest, checkpoint_folder: Callable[..., Path]) -> Path:
    return checkpoint_folder(request.param)


def make_engine(folder: Path) -> Engine:
    config = cpu_config(folder, max_slots=13, encode_batch=4)
    return Engine(config)


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tape]:
    """Make engines replay steps, as they do on a GPU."""
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
        for picture in random_images(24, seed=2)
    ]


def served(engine: Engine) -> list[tuple[int, ...]]:
    """Serve two waves, so that texts arrive while others run; a text of the second wave lets the slots
    grow."""
    first, second = make_requests()[:14], make_requests()[14:]
    futures = [engine.submit(request) for request in first]
    futures[3].result(timeout=60)
    futures += [engine.submit(request) for request in second]
    long = GenerationOptions(max_new_tokens=40, min_new_tokens=40)
    futures.append(engine.submit(Request(image=random_images(1)[0].numpy()), long))
    return [future.result(timeout=60).token_ids for future in futures]


def test_an_engine_that_replays_gives_the_same_tokens(folder: Path, tape: Tape, monkeypatch) -> None:
    with make_engine(folder) as engine:
        replayed = served(engine)
        images = engine._core.runner.encoders._replay
        assert images is not None and images._pass is not None, "full batches of images are replayed too"
    assert tape.num_captured > 3
    monkeypatch.undo()
    with make_engine(folder) as engine:
        assert served(engine) == replayed


def test_steps_that_cannot_be_captured_run_eagerly(
    folder: Path, tape: Tape, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A driver or an operation that refuses must cost speed, not captions, and must not log a line per
    step."""

    def refuse(step: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(tape, "capture", refuse)
    with caplog.at_level(logging.WARNING), make_engine(folder) as engine:
        found = served(engine)
    num_said = sum("could not be captured" in record.message for record in caplog.records)
    assert num_said == 2  # once for images, once for decode steps
    monkeypatch.undo()
    with make_engine(folder) as engine:
        assert served(engine) == found


def test_a_replayed_batch_of_images_is_the_callers(model: Blip2) -> None:
    """The next batch must not change the result, nor must discarding the pass."""
    tape = Tape()
    encoders, eager = Encoders(model, full_batch=4, capturer=tape), Encoders(model)
    batches = [random_images(4, seed=seed) for seed in range(4)]
    with torch.inference_mode():
        found = [encoders(batch) for batch in batches[:3]]
        assert tape.num_captured == 1 and encoders(batches[0][:3]).prefixes.shape[0] == 3
        encoders.forget()
        found.append(encoders(batches[3]))
        for batch, encoded in zip(batches, found, strict=True):
            torch.testing.assert_close(tuple(encoded), tuple(eager(batch)), rtol=1e-5, atol=1e-5)
    assert tape.num_captured == 1, "the first batch after forgetting is not captured"


def test_a_first_full_batch_that_does_not_fit_leaves_the_next_one_as_it_was(
    model: Blip2, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders, batch = Encoders(model, full_batch=4, capturer=Tape()), random_images(4)
    with torch.inference_mode():
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(model.vision, "forward", exhausted)
            encoders(batch)
        for _ in range(2):
            torch.testing.assert_close(encoders(batch).prefixes, Encoders(model)(batch).prefixes)


def exhausted(*_: object) -> object:
    raise torch.OutOfMemoryError("no memory")


@pytest.mark.parametrize("num_failures", [1, 1000])
def test_out_of_memory_during_a_capture_costs_no_slots(
    checkpoint_folder: Callable[..., Path],
    tape: Tape,
    monkeypatch,
    caplog: pytest.LogCaptureFixture,
    num_failures: int,
) -> None:
    """A capture cannot allocate from cached memory, so a step may fit although its capture does not. It is
    captured again with an empty cache, and runs eagerly if that fails too."""
    folder, capture = checkpoint_folder("opt"), tape.capture
    emptied: list[int] = []
    failures: list[Callable[[], None]] = []

    def fail(step: Callable[[], None]) -> Callable[[], None]:
        if len(failures) < num_failures:
            failures.append(step)
            raise torch.OutOfMemoryError("capture")
        return capture(step)

    with caplog.at_level(logging.WARNING), make_engine(folder) as engine:
        monkeypatch.setattr(tape, "capture", fail)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(failures)))
        num_captured = tape.num_captured
        replayed = served(engine)
        assert engine._core.scheduler.limits.max_slots == 13
    if num_failures == 1:
        assert emptied == [1]
        assert tape.num_captured > num_captured
    else:
        assert emptied == list(range(1, len(failures), 2))  # after every first attempt, and only then
        assert tape.num_captured == num_captured
        assert "was not captured" in caplog.text
    monkeypatch.undo()
    with make_engine(folder) as engine:
        assert served(engine) == replayed


def test_out_of_memory_in_the_step_itself_halves_the_slots(
    checkpoint_folder: Callable[..., Path], tape: Tape, monkeypatch
) -> None:
    """The step fits neither captured nor eagerly, so fewer texts must run at once."""
    folder, failures = checkpoint_folder("opt"), [torch.OutOfMemoryError("step")] * 3
    with make_engine(folder) as engine:
        capture, decode = tape.capture, engine.model.language_model.decode
        images = engine._core.runner.encoders._replay
        assert images is not None

        def fail_twice(step: Callable[[], None]) -> Callable[[], None]:
            if len(failures) > 1 and step != images._encode:  # a full batch of images may be captured first
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


def attention_formula(
    query: Tensor, kv: Tensor, counts: Tensor, bias: Tensor | None, num_heads: int, scale: float | None
) -> Tensor:
    """The formula of `decode_attention` on a GPU."""
    keys, values = kv[: len(query)].unflatten(-1, (2 * num_heads, -1)).transpose(1, 2).chunk(2, dim=1)
    heads = query.unflatten(-1, (num_heads, 1, -1))
    scores = heads @ keys.transpose(-1, -2) * (heads.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + F.pad(bias.nan_to_num(neginf=0), (0, kv.shape[1] - bias.shape[-1]))
    outside = torch.arange(kv.shape[1]) >= counts[:, None, None, None]
    return (scores.masked_fill(outside, float("-inf")).softmax(-1) @ values).flatten(1)


def test_attention_that_reads_the_number_of_positions_gives_the_same_tokens(
    folder: Path, tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, all steps have the `kv_len` of the whole slots, and read the lengths from the device."""
    with make_engine(folder) as engine:
        expected = served(engine)
    num_graphs = tape.num_captured
    monkeypatch.setattr("blip2_actor.models.kv_cache._find_kernel", lambda *_: attention_formula)
    with make_engine(folder) as engine:
        assert served(engine) == expected
        runner = engine._core.runner
        assert runner.slots.reads_counts and runner._replay is not None
        shapes: list[Any] = list(runner._replay._seen)
        assert {kv_len for _, kv_len, _ in shapes} == {runner.slots.max_length}
    assert tape.num_captured > num_graphs
