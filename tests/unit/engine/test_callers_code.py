"""Callers' code that runs in the engine's thread: whatever it raises ends nobody else's request."""

from __future__ import annotations

import threading
from asyncio import CancelledError
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch

from blip2_actor import Engine, GenerationOptions, Request, Status
from blip2_actor.generation.search import TextSearch
from blip2_actor.testing import random_images, save_tiny_checkpoint
from tests.engines import cpu_config

PICTURE = random_images(1)[0].numpy()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("opt"))
    config = cpu_config(folder, skip_self_test=True)
    with config.build() as started:
        yield started


def raising(error: BaseException, num_calls: int = 1) -> Any:
    """Return a function of anything that raises in its call of this number and in each later one."""
    calls: list[object] = []

    def call(*args: Any) -> Any:
        calls.append(args)
        if len(calls) >= num_calls:
            raise error
        return args[-1]

    call.calls = calls  # type: ignore[attr-defined]
    return call


@pytest.mark.parametrize("error", [ValueError("no"), CancelledError(), SystemExit(3)], ids=repr)
def test_what_a_caller_raises_ends_nobody_elses_request(
    engine: Engine, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """A cancelled task's error, or an exit, used to end the engine's thread and so everybody's requests."""
    expected = engine.submit(PICTURE).result(30)
    on_text = raising(error)
    assert engine.submit(PICTURE, on_text=on_text).result(30) == expected
    assert len(on_text.calls) == 1

    on_text = raising(error)
    options = engine._input_processor.resolve(GenerationOptions())
    state = engine._input_processor.request_state(Request(image=PICTURE), options, on_text)
    for _ in range(2):
        cast(TextSearch, state.searches[0]).accept(5, -1.0)
        state.restart()
    assert len(on_text.calls) == 1

    processed = engine.submit(Request(image=PICTURE, logits_processor=raising(error))).result(30)
    assert processed.status is Status.FAILED
    assert processed.error == f"logits_processor must not raise, got {error!r}"

    watcher = raising(error)
    engine.step_watchers.append(watcher)
    assert engine.submit(PICTURE).result(30) == expected
    assert len(watcher.calls) == 1 and not engine.step_watchers

    is_attached = threading.Event()  # before the end of the text, so that the callback runs in that thread

    def wait(text: str) -> None:
        is_attached.wait(30)

    future = engine.submit(PICTURE, on_text=wait)
    future.add_done_callback(raising(error))
    is_attached.set()
    assert future.result(30) == engine.submit(PICTURE).result(30) == expected
    told = [record.getMessage().partition(" has raised")[0] for record in caplog.records]
    assert told[:3] == ["on_text", "on_text", "a step watcher"]


def test_a_text_whose_processor_has_failed_grows_no_further(engine: Engine) -> None:
    """One more token, selected without the processor, used to reach `on_text`."""
    texts: list[str] = []
    processor = raising(ValueError("no"), num_calls=3)
    request = Request(image=PICTURE, logits_processor=processor)
    result = engine.submit(request, on_text=texts.append).result(30)
    assert (result.status, len(texts)) == (Status.FAILED, 2)


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True}, {"num_beams": 2}, {"num_beams": 2, "do_sample": True}], ids=str
)
@pytest.mark.parametrize("score", [-torch.inf, torch.nan])
def test_a_text_for_which_no_token_is_left_fails(engine: Engine, options: dict, score: float) -> None:
    """The first token of the vocabulary used to be selected again and again, with status ok."""
    vocab_size = engine.prompts.vocab_size
    banned = GenerationOptions(suppress_tokens=tuple(range(vocab_size)), **options)

    lengths: list[int] = []

    def ban_from_the_third_token(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        lengths.append(ids.shape[1])
        return scores if len(lengths) < 3 else torch.full_like(scores, score)

    chosen = GenerationOptions(max_new_tokens=8, min_new_tokens=8, **options)
    requests = [
        Request(image=PICTURE, options=banned),
        Request(image=PICTURE, options=chosen, logits_processor=ban_from_the_third_token),
        Request(image=PICTURE, options=chosen),
    ]
    *failed, served = engine.generate(requests)
    assert [result.status for result in failed] == [Status.FAILED] * 2
    assert all("must be above -inf" in str(result.error) for result in failed)
    assert len(lengths) == 3 and served.ok


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_processor_that_allows_one_text_gets_it(engine: Engine, num_beams: int) -> None:
    """With beams, nothing is left to select once that text, which is the result, has ended."""
    (end_id, *_) = engine.prompts.end_ids
    allowed = [9, 8, end_id]
    begins: list[int] = []

    def allow(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        begins.append(ids.shape[1])
        position = ids.shape[1] - begins[0]
        forced = torch.full_like(scores, -torch.inf)
        if position < len(allowed):
            forced[:, allowed[position]] = torch.inf if num_beams == 1 else 0
        return forced

    options = GenerationOptions(max_new_tokens=6, num_beams=num_beams)
    result = engine.generate([Request(image=PICTURE, options=options, logits_processor=allow)])[0]
    assert result.ok and result.token_ids == tuple(allowed)


def test_a_text_is_cancelled_although_the_callers_callback_raises(engine: Engine) -> None:
    """Its slot used to stay taken until the last token of a text that nobody wanted."""
    has_begun, may_go_on = threading.Event(), threading.Event()

    def wait(text: str) -> None:
        has_begun.set()
        may_go_on.wait(30)

    num_tokens = engine.stats().num_tokens
    future = engine.submit(PICTURE, GenerationOptions(max_new_tokens=20, min_new_tokens=20), on_text=wait)
    future.add_done_callback(raising(CancelledError()))
    assert has_begun.wait(30)
    with pytest.raises(CancelledError):
        future.cancel()
    may_go_on.set()
    engine.submit(PICTURE, GenerationOptions(max_new_tokens=30, min_new_tokens=30)).result(30)
    assert engine.stats().num_tokens - num_tokens < 40


def test_a_logits_processor_that_calls_the_engine_is_named(engine: Engine) -> None:
    """The error used to mention a done callback, which its caller did not have."""

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        engine.generate(PICTURE)
        return scores

    result = engine.submit(Request(image=PICTURE, logits_processor=processor)).result(30)
    assert result.status is Status.FAILED and "in a callback or a logits processor" in str(result.error)
