"""Continuous batching: the result of a request does not depend on other requests or their timing."""

from __future__ import annotations

import concurrent.futures
import itertools
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from blip2_actor import Engine, GenerationOptions, Request, Status
from blip2_actor.engine import core, startup
from blip2_actor.models import kv_cache
from blip2_actor.testing import IMAGE_SIZE_PX, random_images
from tests.engines import cpu_config
from tests.parity.engine.tape import Tape

PROMPTS = [None, "a", "Question: what is it? Answer:", "été ☃", "this is a photo of"]
END_OFTEN = 65
"""A token that the random model often selects; as the end token, it gives texts of many lengths."""


@pytest.fixture(scope="module")
def folder(checkpoint_folder: Callable[..., Path]) -> Path:
    return checkpoint_folder(eos_token_id=END_OFTEN, seed=3)


@pytest.fixture(scope="module", params=["one-thread", "two-threads", "reads-late"])
def engine(folder: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    config = cpu_config(
        folder, num_threads=2 if request.param == "two-threads" else 1, max_slots=7, encode_batch=3
    )
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "reads-late":  # as on a GPU
            patch.setattr(core, "reads_late", lambda device: True)
            patch.setattr(startup, "capturer_for", lambda *_, **__: Tape())
        with Engine(config) as started:
            yield started


def make_requests(count: int, seed: int = 0) -> list[Request]:
    choose = random.Random(seed)
    return [
        Request(
            image=image.numpy(),
            prompt=choose.choice(PROMPTS),
            options=GenerationOptions(
                max_new_tokens=choose.randint(1, 16), num_beams=choose.choice([1, 1, 1, 2, 3])
            ),
        )
        for image in random_images(count, seed)
    ]


@pytest.fixture(scope="module")
def asked() -> list[Request]:
    return make_requests(64)


@pytest.fixture(scope="module")
def alone(folder: Path, asked: list[Request]) -> list[tuple[int, ...]]:
    """The token ids of each request run alone."""
    with Engine(cpu_config(folder)) as engine:
        return [engine.generate([request])[0].token_ids for request in asked]


def test_a_batch_of_64_gives_what_each_request_gives_alone(engine, asked, alone) -> None:
    assert [r.token_ids for r in engine.generate(asked)] == alone
    assert len({len(ids) for ids in alone}) > 8, "the test needs texts of different lengths"


def test_any_order_of_arrivals_and_cancellations_gives_the_same_tokens(engine, asked, alone, request) -> None:
    """200 seeded sequences: a slot that is freed too early, moved wrongly or not moved changes another
    text."""
    for seed in range(200 if request.node.callspec.id == "one-thread" else 50):
        choose = random.Random(seed)
        picked = choose.sample(range(len(asked)), choose.randint(1, 9))
        futures = []
        for index in picked:
            futures.append((index, engine.submit(asked[index])))
            if choose.random() < 0.25:
                choose.choice(futures)[1].cancel()
            if choose.random() < 0.2:
                concurrent.futures.wait([futures[0][1]], timeout=60)
        for index, future in futures:
            try:
                assert future.result(timeout=60).token_ids == alone[index], (
                    f"sequence {seed}, request {index}"
                )
            except CancelledError:
                continue
    assert engine.stats().num_running == 0


def test_texts_that_give_their_slots_up_have_the_same_tokens_in_the_end(engine, asked, alone) -> None:
    """Requests of low priority fill all seven slots, and others arrive between any two steps."""
    before = engine.stats().num_preempted
    low = [replace(request, low_priority=True) for request in asked]
    for seed in range(3):
        choose = random.Random(seed)
        futures = [(index, engine.submit(low[index])) for index in choose.sample(range(len(asked)), 24)]
        for index in choose.sample(range(len(asked)), 24):
            concurrent.futures.wait([choose.choice(futures)[1]], timeout=0.005)
            futures.append((index, engine.submit(asked[index])))
        assert [future.result(60).token_ids for _, future in futures] == [alone[i] for i, _ in futures], seed
    assert engine.stats().num_preempted > before + 3


def test_greedy_texts_take_their_own_tokens_again(engine, asked, alone) -> None:
    """Unless beams run next to them, steps are queued ahead if the engine reads late."""
    greedy = [index for index, request in enumerate(asked) if request.options.num_beams == 1]
    before = engine.stats().num_preempted
    futures = [(i, engine.submit(replace(asked[i], low_priority=True))) for i in greedy]
    for index in greedy:
        concurrent.futures.wait([futures[-1][1]], timeout=0.005)
        futures.append((index, engine.submit(asked[index])))
    assert [future.result(60).token_ids for _, future in futures] == [alone[i] for i, _ in futures]
    assert engine.stats().num_preempted > before


def test_concurrent_callers_share_passes_of_the_encoder(folder) -> None:
    """Sixteen threads with one image each must not need sixteen passes."""
    config = cpu_config(folder, max_slots=16, encode_batch=8)
    with Engine(config) as engine:
        start = threading.Barrier(16)
        results: list[tuple[int, ...] | None] = [None] * 16

        def call(index: int, request: Request) -> None:
            start.wait()
            results[index] = engine.generate([request])[0].token_ids

        threads = [threading.Thread(target=call, args=pair) for pair in enumerate(make_requests(16, 5))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(results)
        assert engine.stats().num_encode_calls < 16
        assert engine.stats().num_images_encoded == 16


def test_one_image_for_many_requests_is_encoded_once(engine) -> None:
    """Several prompts and several texts for one image need one pass of the vision encoder."""
    shared = engine.image(random_images(1, 9)[0].numpy())
    before = engine.stats().num_images_encoded
    results = engine.generate([Request(image=shared, prompt=p) for p in PROMPTS])
    again = engine.generate(
        [Request(image=shared, options=GenerationOptions(num_beams=3, num_return_sequences=3))]
    )
    assert engine.stats().num_images_encoded == before + 1
    assert len(again[0].completions) == 3
    separate = engine.generate([Request(image=random_images(1, 9)[0].numpy(), prompt=p) for p in PROMPTS])
    assert [r.token_ids for r in results] == [r.token_ids for r in separate]


def test_cancelling_frees_the_slot_for_the_next_request(folder) -> None:
    """With one slot, the next text must not wait until a cancelled long text ends."""
    config = cpu_config(folder, max_slots=1, encode_batch=1)
    with Engine(config) as engine:
        image = random_images(1)[0].numpy()
        options = GenerationOptions(max_new_tokens=60, min_new_tokens=60)
        stream = engine.stream(Request(image=image), options)
        next(stream)
        stream.close()
        result = engine.generate([Request(image=image)], GenerationOptions(max_new_tokens=3))[0]
        assert len(result.token_ids) <= 3
        assert engine.stats().num_decode_steps < 59


def test_stream_pieces_join_to_the_text_and_never_cut_a_character(engine) -> None:
    for request in make_requests(12, 4):
        options = GenerationOptions(max_new_tokens=24)
        plain = Request(image=request.image, prompt=request.prompt)
        text = engine.generate([plain], options)[0].text
        pieces = list(engine.stream(plain, options))
        assert "".join(pieces) == text


def test_refused_requests_fail_alone(engine, asked, alone) -> None:
    """A bad request gets its status, and the requests next to it are not affected."""
    bad = [
        (Request(image=b"not an image"), Status.UNDECODABLE),
        (Request(image=b""), Status.MISSING_IMAGE),
        (Request(image=asked[0].image, prompt="long " * 50), Status.REFUSED),
        (Request(image=asked[0].image, prompt="an <image> token"), Status.REFUSED),
        (Request(image=asked[0].image, options=GenerationOptions(num_beams=8)), Status.REFUSED),
        (Request(image=np.zeros((0, 4, 3), np.uint8)), Status.UNDECODABLE),
    ]
    mixed = [request for pair in zip(asked, [b for b, _ in bad], strict=False) for request in pair]
    results = engine.generate(mixed)
    assert [r.token_ids for r in results[::2]] == alone[: len(bad)]
    for result, (_, status) in zip(results[1::2], bad, strict=True):
        assert result.status is status
        assert result.error
        assert result.text is None


def test_stop_texts_end_the_text_and_are_cut(engine) -> None:
    request = Request(image=random_images(1)[0].numpy())
    options = GenerationOptions(max_new_tokens=24, min_new_tokens=24)
    whole = engine.generate([request], options)[0].text
    stop = whole[len(whole) // 2]
    stopped = engine.generate(
        [request], GenerationOptions(max_new_tokens=24, min_new_tokens=24, stop=(stop,))
    )[0]
    assert stopped.text == whole[: whole.index(stop)].strip()
    assert stopped.finish_reason == "stop"


def test_a_stream_ends_where_a_stop_text_begins(engine) -> None:
    """A stop text that ended within a token used to be streamed with the rest of that token."""
    request = Request(image=random_images(1)[0].numpy())
    whole = engine.generate([request], GenerationOptions(max_new_tokens=8, min_new_tokens=8))[0].text
    stops = {whole[at : at + length] for length in (1, 2, 3) for at in range(len(whole) - length)}
    for stop in stops:
        options = GenerationOptions(max_new_tokens=8, min_new_tokens=8, stop=(stop,))
        assert "".join(engine.stream(request, options)) == engine.generate([request], options)[0].text


def test_texts_so_far_grow_into_the_result(engine) -> None:
    """The values that `submit` reports while a text grows, and the number of prompt tokens at its end."""
    request = Request(image=random_images(1)[0].numpy(), prompt="a photo of")
    texts: list[str] = []
    result = engine.submit(request, GenerationOptions(max_new_tokens=12), texts.append).result()
    assert len(texts) == len(result.token_ids)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert result.text.startswith(texts[-1])
    assert result.num_prompt_tokens == len(engine.prompts.encode("a photo of"))
    several = GenerationOptions(num_beams=2, max_new_tokens=3)
    assert engine.submit(request, several, texts.append).result().ok
    assert len(texts) == len(result.token_ids)


def raise_out_of_memory() -> None:
    raise torch.OutOfMemoryError("no more than 4 rows")


@pytest.mark.parametrize(
    ("stage", "allocate"),
    [
        ("encode", lambda: np.empty(1 << 60, np.uint8)),
        ("prefill", lambda: torch.empty(1 << 60, dtype=torch.uint8)),
        ("prefill", lambda: kv_cache._zeros((1 << 60,), torch.device("cpu"), torch.uint8)),
        ("decode", raise_out_of_memory),
    ],
)
def test_out_of_memory_halves_and_loses_nothing(folder, asked, alone, monkeypatch, stage, allocate) -> None:
    """On a device that can hold only a few rows at once, everything is still served, in smaller pieces.

    NumPy, torch on a CPU, the slots on a CPU and torch on a GPU each raise a different error.
    """
    config = cpu_config(folder, num_threads=2, max_slots=16)
    with Engine(config) as engine:
        real = getattr(engine._core.runner, stage)

        def small_device(rows: list[object], *more: object) -> object:
            if len(rows) > 4:
                allocate()
            return real(rows, *more)

        monkeypatch.setattr(engine._core.runner, stage, small_device)
        assert [r.token_ids for r in engine.generate(asked)] == alone
        limits = engine._core.scheduler.limits
        assert min(limits.max_slots, limits.encode_batch, limits.prefill_batch) <= 4


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_failing_device_fails_every_request_and_says_why(folder, monkeypatch, num_threads) -> None:
    """A host must not wait forever, but learn that the engine has failed."""
    config = cpu_config(folder, num_threads=num_threads)
    with Engine(config) as engine:

        def broken(*_: object) -> None:
            raise RuntimeError("the device fell off")

        monkeypatch.setattr(engine._core.runner, "encode", broken)
        with pytest.raises(RuntimeError, match="fell off"):
            engine.generate(make_requests(5))
        with pytest.raises(RuntimeError, match="has failed"):
            engine.submit(make_requests(1)[0])


def test_a_request_that_arrives_during_a_task_is_finished_before_the_engine_closes(folder) -> None:
    """A caller would wait forever for a request that is accepted and then forgotten."""
    engine = Engine(cpu_config(folder))
    begun, closing = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        closing.wait(30)

    caller = threading.Thread(target=engine._core.call, args=(work,))
    caller.start()
    begun.wait(30)
    future = engine.submit(make_requests(1)[0])
    closer = threading.Thread(target=engine.close)
    closer.start()
    while not engine._core.is_closed:
        time.sleep(0)
    closing.set()
    closer.join()
    caller.join()
    assert future.result(timeout=0).ok


def test_a_closed_engine_finishes_what_it_took_and_refuses_more(folder) -> None:
    engine = Engine(cpu_config(folder))
    future = engine.submit(Request(image=np.zeros((IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), np.uint8)))
    engine.close()
    assert future.result(timeout=0).ok
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(Request(image=np.zeros((IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3), np.uint8)))


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_process_that_never_closes_its_engine_ends_cleanly(folder, num_threads) -> None:
    """A thread that is inside torch when the interpreter exits aborts the process with SIGABRT.

    Also, torch's compiler, which takes two seconds to import, must not be imported.
    """
    code = f"""
import sys
import numpy as np
from blip2_actor import EngineConfig, GenerationOptions, Request
engine = EngineConfig(model={str(folder)!r}, dtype="float32", device="cpu", num_threads={num_threads}).build()
request = Request(image=np.zeros(({IMAGE_SIZE_PX}, {IMAGE_SIZE_PX}, 3), np.uint8))
options = GenerationOptions(max_new_tokens=60, min_new_tokens=60)
futures = [engine.submit(request, options) for _ in range(300)]
futures[0].result()
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
