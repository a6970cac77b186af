"""Requests submitted in groups: each is counted once, and none runs on for a caller that has left."""

from __future__ import annotations

import queue
from concurrent.futures import Future
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from blip2_actor import GenerationOptions, Request, Result, Status
from blip2_actor.engine import submission
from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.input_processor import stable_text
from blip2_actor.engine.refusal import RequestRefused
from blip2_actor.engine.request_state import RequestState
from blip2_actor.request import Completion


@pytest.fixture
def enqueued(monkeypatch: pytest.MonkeyPatch) -> list[RequestState]:
    """Requests that the engine's thread would receive, in groups of one."""
    monkeypatch.setattr(submission, "MAX_ENCODE_BATCH", 1)
    return []


def submit(enqueued: list[RequestState], images: list[Any], on_done: Any = None) -> Any:
    def prepare(request: Request, *rest: object) -> RequestState:
        if isinstance(request.image, Exception):
            raise request.image
        return RequestState(EncodedImage(request.image))  # type: ignore[arg-type]

    core: Any = SimpleNamespace(
        require_own_process=lambda: None, enqueue=lambda states, num_requests: enqueued.extend(states)
    )
    asked: Any = [(Request(image=image), GenerationOptions(), None) for image in images]
    return submission.submit(core, SimpleNamespace(request_state=prepare), asked, on_done)  # type: ignore[arg-type]


def test_each_request_is_reported_done_once(enqueued: list[RequestState]) -> None:
    done: list[int] = []
    refusal = RequestRefused(Status.REFUSED, "not this one")
    futures = submit(enqueued, [b"a", refusal, b"b"], lambda: done.append(1))
    assert len(done) == 1 and futures[1].result().error == "not this one"
    for state in enqueued:
        state.resolve(Result())
    assert len(done) == 3


def test_a_request_that_is_cancelled_while_it_ends_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its waiters used to be told twice, and the second time raised an error that ended the engine."""
    state = RequestState(EncodedImage(b""))  # type: ignore[arg-type]
    really_run = state.future.set_running_or_notify_cancel
    monkeypatch.setattr(
        state.future, "set_running_or_notify_cancel", lambda: state.future.cancel() and really_run()
    )
    state.resolve(Result())
    assert state.is_dropped() and state.is_dropped()


def test_an_error_cancels_what_is_queued_already(enqueued: list[RequestState]) -> None:
    """The caller gets the error and no future, so nobody could cancel them."""
    with pytest.raises(TypeError, match="wrong"):
        submit(enqueued, [b"a", b"b", TypeError("wrong")])
    assert [state.future.cancelled() for state in enqueued] == [True, True]


@pytest.mark.parametrize("text", ["a man 's hat is n't red .", "they 've ' many ' , we 're 'm ' .", "  'n'"])
def test_a_stream_says_the_whole_text_where_a_tokenizer_drops_spaces(text: str) -> None:
    """The stream used to say `a man '`, which does not begin `a man's hat`, and then nothing more."""
    clean_up = partial(PreTrainedTokenizerFast.clean_up_tokenization, None)  # it does not use the object
    grown = [clean_up(text[:end]) for end in range(len(text) + 1)]
    texts: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for one in grown:
        texts.put(stable_text(one, ()))
    whole = grown[-1].strip()
    future: Future[Result] = Future()
    completion = Completion(text=whole, token_ids=(), logprob=0.0, finish_reason="stop")
    future.set_result(Result(completions=(completion,)))
    assert "".join(submission.text_pieces(texts, future)) == whole
