"""Who may call an engine, and what ends it: processes, threads, and references."""

from __future__ import annotations

import gc
import os
import pickle
import queue
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from blip2_actor import Engine, EngineConfig, GenerationOptions, MatchingConfig, MatchingEngine, Request
from blip2_actor.device import set_num_threads
from blip2_actor.engine.core import Task
from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.request_state import RequestState
from blip2_actor.generation.beam_search import BeamSearch
from blip2_actor.generation.search import TextSearch
from blip2_actor.testing import random_images, save_tiny_checkpoint, save_tiny_retrieval_checkpoint
from tests.engines import cpu_config

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
"""Python 3.12 warns about what these tests do on purpose."""

PICTURE = random_images(1)[0].numpy()


def config(folder: Path, num_threads: int = 1) -> EngineConfig:
    return cpu_config(folder, num_threads=num_threads, skip_self_test=True)


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("opt"))


@pytest.fixture(scope="module")
def engine(checkpoint_folder: Path) -> Iterator[Engine]:
    with config(checkpoint_folder).build() as started:
        yield started


@pytest.fixture(scope="module")
def matching_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MatchingEngine]:
    folder = save_tiny_retrieval_checkpoint(tmp_path_factory.mktemp("matching"))
    with MatchingConfig(model=str(folder), device="cpu", dtype="float32", num_threads=1).build() as started:
        yield started


CAPTION_CALLS: dict[str, Callable[[Engine], Any]] = {
    "generate": lambda engine: engine.generate([Request(image=PICTURE)]),
    "submit": lambda engine: engine.submit(Request(image=PICTURE)),
    "stream": lambda engine: list(engine.stream(Request(image=PICTURE))),
    "features": lambda engine: engine.features([PICTURE]),
    "text_features": lambda engine: engine.text_features(["a"]),
    "score": lambda engine: engine.score([PICTURE], ["a"]),
    "image": lambda engine: engine.image(PICTURE),
}
MATCHING_CALLS: dict[str, Callable[[MatchingEngine], Any]] = {
    "score": lambda engine: engine.score([PICTURE], ["a"]),
    "image_embeddings": lambda engine: engine.image_embeddings([PICTURE]),
    "text_embeddings": lambda engine: engine.text_embeddings(["a"]),
}


def in_a_forked_child(work: Callable[[], Any]) -> str:
    """Return the message of the error that `work` raises in a forked child; empty if it ends."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        signal.alarm(20)
        try:
            work()
        except BaseException as error:
            os.write(writing, str(error).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        message = pipe.read().decode()
    assert os.waitpid(child, 0)[1] == 0, "the child waited for ever"
    return message


def test_each_call_in_a_forked_child_says_what_to_do(engine, matching_engine) -> None:
    """The child has none of the engine's threads, so it would wait forever."""

    def messages() -> Iterator[str]:
        for calls, called in ((CAPTION_CALLS, engine), (MATCHING_CALLS, matching_engine)):
            for call in calls.values():
                with pytest.raises(RuntimeError) as raised:
                    call(called)
                yield str(raised.value)

    def report() -> None:
        found = set(messages())
        engine.close()
        matching_engine.close()
        raise ValueError("\n".join(found))

    (message,) = in_a_forked_child(report).splitlines()
    assert "must be used in the process that built it" in message
    assert "build an engine there" in message
    assert engine.generate([Request(image=PICTURE)])[0].ok  # the parent does not notice


def test_a_child_that_exits_does_not_wait_for_the_engine(engine) -> None:
    """The engine's exit handler would take a lock that was held when the child was forked."""
    with engine._core._lock:
        assert in_a_forked_child(engine._core._thread._end_at_exit) == ""


class CaptionedPictures(Dataset):
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return self.engine.generate([Request(image=PICTURE)])[0].text


def test_a_dataset_under_workers_raises(engine) -> None:
    loader = DataLoader(CaptionedPictures(engine), num_workers=1, multiprocessing_context="fork", timeout=60)
    with pytest.raises(RuntimeError, match="num_workers=0"):
        list(loader)


def test_an_engine_is_not_pickled(engine, matching_engine) -> None:
    """Spawned workers get a pickled copy; the message used to be about a lock."""
    for one in (engine, matching_engine):
        with pytest.raises(TypeError, match="send its configuration"):
            pickle.dumps(one)


@pytest.mark.parametrize("name", [name for name in CAPTION_CALLS if name not in ("submit", "image")])
def test_a_done_callback_does_not_wait_for_its_own_thread(engine, name: str) -> None:
    answers: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def call(future: Future[Any]) -> None:
        try:
            CAPTION_CALLS[name](engine)
            answers.put(None)
        except Exception as error:
            answers.put(error)

    error = None
    while error is None:  # a request that ends at once has its callback called in this thread, which may wait
        engine.submit(Request(image=PICTURE), GenerationOptions(max_new_tokens=2)).add_done_callback(call)
        error = answers.get(timeout=30)
    assert isinstance(error, RuntimeError) and "the engine's own thread" in str(error)


def test_a_done_callback_may_submit_and_close(checkpoint_folder) -> None:
    """This includes a callback in the thread that takes new requests, where an impossible request ends."""
    engine = config(checkpoint_folder).build()
    image = engine.image(PICTURE)
    engine.features([image])
    engine._core.scheduler.limits.max_slots = 1  # as after running out of memory
    beams = GenerationOptions(num_beams=2)
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def again(future: Future[Any]) -> None:
        results.put(future.result())
        engine.submit(Request(image=PICTURE)).add_done_callback(close)

    def close(future: Future[Any]) -> None:
        engine.close()
        results.put(future.result())

    engine.submit(Request(image=image, options=beams)).add_done_callback(again)
    assert "num_beams" in results.get(timeout=30).error
    assert results.get(timeout=30).ok
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(Request(image=PICTURE))


def test_a_task_that_exits_ends_nothing(engine) -> None:
    """The thread used to die of it while failing the others, and every caller waited forever."""

    def leave() -> None:
        raise SystemExit(3)

    task = Task(leave)
    engine._core.enqueue([task])
    assert isinstance(task.future.exception(30), SystemExit)
    assert engine.submit(Request(image=PICTURE)).result(30).ok


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("num_threads", [1, 2])
def test_an_engine_that_nobody_holds_ends_its_threads_and_frees_the_model(
    checkpoint_folder, num_threads: int, no_garbage_collection: None
) -> None:
    """Notebooks build one engine after the other. The futures and results of the first do not keep it, nor do
    refused rows: the traceback of an error holds the frames that hold the engine."""
    running = {thread.name for thread in threading.enumerate()}
    engine = config(checkpoint_folder, num_threads).build()
    futures = [engine.submit(Request(image=PICTURE)) for _ in range(9)]
    shared = engine.image(PICTURE)
    kept = [
        shared,
        engine.features([shared], with_attention_maps=True),
        engine.score([PICTURE], ["a"]),
        list(engine.stream(Request(image=PICTURE))),
        engine.generate([Request(image=b""), Request(image=PICTURE, prompt="a" * 1000)]),
        engine.features([b"no image"]),
        engine.score([b"no image", PICTURE], ["a", ""]),
        engine.text_features([""]),
    ]
    model, runner = weakref.ref(engine.model), weakref.ref(engine._core.runner)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("blip2-")]
    assert len(threads) == num_threads + len([name for name in running if name.startswith("blip2-")])
    del engine
    assert all(future.result(30).ok for future in futures), "what was accepted is finished"
    for thread in threads[-num_threads:]:
        thread.join(30)
        assert not thread.is_alive()
    assert model() is None and runner() is None
    assert kept and futures


def test_a_matching_engine_that_nobody_holds_ends_too(tmp_path: Path, no_garbage_collection: None) -> None:
    folder = save_tiny_retrieval_checkpoint(tmp_path)
    engine = MatchingConfig(model=str(folder), device="cpu", dtype="float32", num_threads=1).build()
    kept = engine.score([PICTURE, b"no image"], ["a", "a"]), engine.text_embeddings(["a", ""])
    model = weakref.ref(engine.model)
    (thread,) = [t for t in threading.enumerate() if t.name.startswith("blip2-matching")][-1:]
    del engine
    thread.join(30)
    assert not thread.is_alive() and model() is None and kept


def test_a_matching_engine_that_is_closed_says_so(tmp_path: Path) -> None:
    """The message used to be the thread pool's: cannot schedule new futures after shutdown."""
    folder = save_tiny_retrieval_checkpoint(tmp_path)
    engine = MatchingConfig(model=str(folder), device="cpu", dtype="float32", num_threads=1).build()
    engine.close()
    for call in MATCHING_CALLS.values():
        with pytest.raises(RuntimeError, match="the engine is closed; build a new one"):
            call(engine)


def test_a_matching_engine_takes_the_threads_of_its_caller(tmp_path: Path) -> None:
    """It used to take the number that another engine's thread had set last."""
    folder = save_tiny_retrieval_checkpoint(tmp_path)
    expected = torch.get_num_threads()
    another = threading.Thread(target=set_num_threads, args=(expected + 1,))
    another.start()
    another.join()
    with MatchingConfig(model=str(folder), device="cpu", dtype="float32").build() as engine:
        assert engine._thread.submit(torch.get_num_threads).result() == expected


def test_an_engine_is_collected_in_its_own_thread(checkpoint_folder) -> None:
    """A done callback may hold the last reference: the thread must not wait for itself."""
    engine = config(checkpoint_folder).build()
    holder = [engine]
    thread = engine._core._thread
    engine.submit(Request(image=PICTURE)).add_done_callback(lambda _: holder.clear())
    del engine
    thread.join(30)
    assert not thread.is_alive()


def test_nothing_of_a_finished_request_is_kept(engine) -> None:
    """This includes refused, cancelled and failed requests, because a server runs for months."""

    def num_kept() -> int:
        gc.collect()
        kinds = (RequestState, EncodedImage, TextSearch, BeamSearch, Task)
        return sum(type(thing) in kinds for thing in gc.get_objects())

    before = num_kept()
    prompts = [None, "a" * 7, "b" * 1000, 5, "c"]
    for n in range(3):
        requests = [Request(image=PICTURE, prompt=prompt) for prompt in prompts]  # type: ignore[arg-type]
        engine.generate(
            [*requests, Request(image=None)], GenerationOptions(max_new_tokens=2, num_beams=1 + n)
        )
        futures = [engine.submit(request) for request in requests]
        assert sum(future.cancel() for future in futures) < len(futures)
        engine.score([PICTURE], ["a"])
        engine.features([PICTURE])
        next(engine.stream(requests[0]), None)
    del requests, futures
    for _ in range(20):  # steps drop what was cancelled; the engine's thread may still be within its last one
        engine.generate([Request(image=PICTURE)])
        if num_kept() <= before:  # earlier tests may have left some in flight
            break
    assert num_kept() <= before
    assert not engine._core._unfinished and not engine._core._arrived
