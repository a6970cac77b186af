"""The remote engine: what it sends, and what it does when the endpoint does not answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import TypeVar

import numpy as np
import pytest

from blip2_actor import GenerationOptions, Request, Result, Score, Status
from blip2_actor.testing import fake_caption, fake_features, fake_score
from pipeline.endpoint import connection, remote_engine, waiting
from pipeline.endpoint.client import Endpoint, EndpointError, pause_s
from pipeline.endpoint.remote_engine import RemoteEngine
from pipeline.endpoint.settings import EndpointConfig
from pipeline.endpoint.waiting import GivenUp, KeyRefused
from pipeline.settings.outputs import Outputs
from pipeline.stages.pending_row import PendingRow
from pipeline.storage.retrying import Trouble, listen
from tests.unit.endpoint.scripted_endpoint import MODEL, Answer, Exchange, endpoint

T = TypeVar("T")

IMAGES = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 3), np.uint8)
CAPTIONS = [fake_caption(image, None) for image in IMAGES]


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Trouble | None]]:
    """The messages to this process's listener; pauses are shortened."""
    monkeypatch.setattr(waiting, "MAX_PAUSE_S", 0.02)
    monkeypatch.setattr(connection, "pause_s", lambda _: 0.02)
    monkeypatch.setattr(remote_engine, "PAUSE_S", 0.02)
    told: list[Trouble | None] = []

    def listener(trouble: Trouble | None) -> bool:
        told.append(trouble)
        return True

    listen(listener)
    yield told
    listen(None)


def results(answer: Answer, images: np.ndarray = IMAGES, **request: object) -> list[Result]:
    with endpoint(answer) as url, RemoteEngine(Endpoint(url, "secret"), MODEL) as engine:
        return engine.generate([Request(image=image, **request) for image in images])  # type: ignore[arg-type]


def in_time(call: Callable[[], T]) -> T:
    """Return the result of a call; if it waits forever, its test fails instead of hanging the run."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(timeout=10)


def texts_of(found: list[Result]) -> list[str | None]:
    return [result.text for result in found]


def test_images_travel_together_and_results_come_back_whole() -> None:
    seen: list[Exchange] = []

    def answer(exchange: Exchange) -> None:
        seen.append(exchange)
        exchange.answer_all()

    found = results(answer, options=GenerationOptions(num_beams=2, max_new_tokens=9), prompt="été ☃")
    assert texts_of(found) == [fake_caption(image, "été ☃") for image in IMAGES]
    assert (found[0].logprob, found[0].token_ids, found[0].token_logprobs) == (
        -0.1 - 0.2,
        (1, 2, 3),
        (-0.1, -0.2, 0.0),
    )
    assert len(seen) < 20 and seen[0].key == "Bearer secret"
    assert seen[0].fields["options"]["num_beams"] == 2 and len(seen[0].fields["options"]) > 10
    assert [seen[0].fields[name] for name in ("digest", "dtype", "quantize")] == [
        MODEL.digest,
        "float32",
        None,
    ]


def test_a_shared_image_is_sent_once_and_options_are_not_mixed() -> None:
    seen: list[Exchange] = []

    def answer(exchange: Exchange) -> None:
        seen.append(exchange)
        exchange.answer_all()

    with endpoint(answer) as url, RemoteEngine(Endpoint(url), MODEL) as engine:
        shared = engine.image(IMAGES[0])
        longer = GenerationOptions(max_new_tokens=50)
        asked = [
            Request(image=shared, prompt=prompt, options=options)
            for options in (GenerationOptions(), longer)
            for prompt in (None, "a", "b")
        ]
        found = engine.generate(asked)
    assert texts_of(found) == [fake_caption(IMAGES[0], request.prompt) for request in asked]
    assert all(len(exchange.images) == 1 for exchange in seen)
    assert {exchange.fields["options"]["max_new_tokens"] for exchange in seen} == {30, 50}


REFUSALS = {
    "busy": lambda exchange: exchange.refuse(503, "overloaded"),
    "quota": lambda exchange: exchange.refuse(429, "quota"),
    "starting": lambda exchange: exchange.refuse(503, "unavailable"),
    "key": lambda exchange: exchange.refuse(403, "no_batch_right"),
    "other-model": lambda exchange: exchange.refuse(409, "wrong_model"),
    "proxy": lambda exchange: exchange.refuse_with("no upstream", 502),
    "gone": lambda exchange: exchange.hang_up(),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_an_endpoint_that_takes_no_work_for_a_while_is_waited_for(kind: str, told, monkeypatch) -> None:
    monkeypatch.setattr(remote_engine, "TELL_EVERY_S", 0.001)
    monkeypatch.setattr(remote_engine, "ANSWER_S", 0.0)  # concerns the trial before work only
    sizes: list[int] = []

    def answer(exchange: Exchange) -> None:
        if exchange.number < 12:
            REFUSALS[kind](exchange)
        else:
            sizes.append(len(exchange.texts))
            exchange.answer_all()

    assert texts_of(results(answer)) == CAPTIONS
    assert max(sizes) > 1, "such a refusal is for no text of its own"
    troubles = [one for one in told if one is not None]  # every second, None asks whether to go on
    if kind in ("busy", "quota"):
        assert not troubles, "an endpoint that is busy with other requests is as it should be"
    else:
        assert troubles[0].place == "endpoint" and told[-1] is None
        state = "refusing the key" if kind == "key" else "out of reach"
        assert troubles[0].state.startswith(f"{state} (http://127.0.0.1:")
        assert not any(isinstance(trouble, KeyRefused) for trouble in troubles)


@pytest.mark.parametrize("code", [401, 403])
def test_a_key_that_is_refused_for_long_ends_the_job(
    code: int, told: list[Trouble | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job whose key was revoked used to wait forever."""
    monkeypatch.setattr(waiting, "KEY_PATIENCE_S", 0.1)

    def listener(trouble: Trouble | None) -> bool:
        told.append(trouble)
        return not isinstance(trouble, KeyRefused)  # the driver stops the job

    listen(listener)
    with (
        endpoint(lambda exchange: exchange.refuse(code, "wrong_key")) as url,
        RemoteEngine(Endpoint(url), MODEL) as engine,
        pytest.raises(GivenUp),
    ):
        in_time(lambda: engine.features(list(IMAGES)))
    last = told[-1]
    assert isinstance(last, KeyRefused) and f"answers {code}: no" in last.state and last.seconds > 0.1


_OUTCOME = b'{"index": %s, "status": "ok", "error": null, "completions": [], "num_prompt_tokens": 1}'
LINES = (b"[]", b"7", b"null", b"{}", *(_OUTCOME % index for index in (b"99", b"-1", b"null")))
"""Answers that no endpoint of this project sends."""


@pytest.mark.parametrize("how", ["hang-up", "overloaded", "timeout", "unavailable", "no-end", *LINES])
def test_what_an_answer_lacks_is_asked_again_and_nothing_else(how: str | bytes) -> None:
    """A line that was not a JSON object used to end the worker, as if its engine were broken."""
    asked: list[int] = []
    lock = threading.Lock()

    def answer(exchange: Exchange) -> None:
        with lock:
            asked.append(len(exchange.texts))
        if exchange.number >= 3:
            exchange.answer_all()
            return
        exchange.begin()
        exchange.answer(*range(len(exchange.texts) - 1, 0, -2))
        if how == "hang-up":
            exchange.hang_up()
        elif how == "no-end":
            exchange.end()
        elif isinstance(how, bytes):
            exchange.send(how + b"\n")
            exchange.end()
        else:
            exchange.break_off(how)

    assert texts_of(results(answer)) == CAPTIONS
    assert sum(asked) <= 20 + 3 * 10 + 3, "what was answered is not made again"


def test_an_image_that_breaks_every_answer_fails_alone() -> None:
    """It would end the endpoint's engine repeatedly, for all its callers."""
    poison = CAPTIONS[7]
    num_broken = 0

    def answer(exchange: Exchange) -> None:
        nonlocal num_broken
        if poison in [fake_caption(exchange.images[text["image"]], None) for text in exchange.texts]:
            num_broken += 1
            exchange.begin()
            exchange.break_off("overloaded")
        else:
            exchange.answer_all()

    found = results(answer)
    assert [result.status for result in found] == [Status.OK] * 7 + [Status.FAILED] + [Status.OK] * 12
    assert str(found[7].error).startswith("the endpoint has failed each time on this image: ")
    assert num_broken == 6


def test_a_text_that_takes_too_long_each_time_fails_and_the_others_do_not() -> None:
    """It would be requested forever."""
    long = CAPTIONS[7]
    num_late = 0

    def answer(exchange: Exchange) -> None:
        nonlocal num_late
        captions = [fake_caption(exchange.images[text["image"]], None) for text in exchange.texts]
        exchange.begin()
        exchange.answer(*(index for index, caption in enumerate(captions) if caption != long))
        if long in captions:
            num_late += 1
            exchange.break_off("timeout")
        else:
            exchange.end()

    found = results(answer)
    assert [result.status for result in found] == [Status.OK] * 7 + [Status.FAILED] + [Status.OK] * 12
    assert num_late == 7, "once behind the others, and six times as the first"


def test_a_text_that_waits_behind_one_that_is_too_long_has_its_own_time() -> None:
    """With time for one text per request, each has its turn, and none is sent alone for being late."""
    sizes: list[int] = []

    def answer(exchange: Exchange) -> None:
        sizes.append(len(exchange.texts))
        exchange.begin()
        exchange.answer(0)
        if len(exchange.texts) > 1:
            exchange.break_off("timeout")
        else:
            exchange.end()

    assert texts_of(results(answer)) == CAPTIONS
    assert sizes.count(1) <= remote_engine.NUM_CONNECTIONS, sizes


def test_what_would_be_refused_again_is_a_result() -> None:
    def answer(exchange: Exchange) -> None:
        exchange.refuse(400, "bad_request", "options: num_beams must be at most 16, got 17")

    (result,) = results(answer, IMAGES[:1])
    assert result.status is Status.REFUSED
    assert result.error == "the endpoint answers 400: options: num_beams must be at most 16, got 17"


@pytest.mark.parametrize("code", [400, 422])
def test_a_text_that_is_refused_costs_no_other_its_result(code: int) -> None:
    """All texts of its request, up to 63 others, used to be refused with it."""
    sizes: list[int] = []

    def answer(exchange: Exchange) -> None:
        sizes.append(len(exchange.scores))
        if any(one["text"] == "bad" for one in exchange.scores):
            exchange.refuse(code, "bad_request", "scores is too long")
        else:
            exchange.answer_all()

    texts = ["good"] * 19 + ["bad"]
    with endpoint(answer) as url, RemoteEngine(Endpoint(url), MODEL) as engine:
        found = engine.score(list(IMAGES), texts)
    expected = [Score(logprob=fake_score(image, "good", None), num_tokens=1) for image in IMAGES[:19]]
    assert found[:19] == expected
    assert (found[19].status, found[19].error) == (
        Status.REFUSED,
        f"the endpoint answers {code}: scores is too long",
    )
    assert max(sizes) > 1, "they were sent together"


def test_a_request_that_is_too_large_is_divided() -> None:
    def answer(exchange: Exchange) -> None:
        if len(exchange.images) > 3:
            exchange.refuse(413, "too_large")
        else:
            exchange.answer_all()

    assert texts_of(results(answer)) == CAPTIONS


def test_a_text_that_nobody_wants_any_longer_is_not_sent() -> None:
    gate = threading.Event()
    sent: list[int] = []

    def answer(exchange: Exchange) -> None:
        sent.append(len(exchange.texts))
        gate.wait(10)
        exchange.answer_all()

    with endpoint(answer) as url, RemoteEngine(Endpoint(url), MODEL) as engine:
        first = [engine.submit(Request(image=image, prompt=str(n))) for n, image in enumerate(IMAGES[:4])]
        deadline = time.monotonic() + 10
        while len(sent) < 4 and sum(sent) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        busy: list[Future[Result]] = [
            engine.submit(Request(image=image, options=GenerationOptions(seed=n, do_sample=True)))
            for n, image in enumerate(IMAGES[4:8])
        ]
        later = [engine.submit(Request(image=image)) for image in IMAGES[8:]]
        for future in later:
            future.cancel()
        gate.set()
        assert not wait([*first, *busy], timeout=10).not_done
    assert sum(sent) == 8


def test_when_the_job_stops_while_the_endpoint_is_gone_nothing_is_asked_any_longer() -> None:
    """The rows stay without a result, and the next start computes them."""
    stopping = threading.Event()
    listen(lambda trouble: not stopping.is_set())
    num_asked = 0

    def answer(exchange: Exchange) -> None:
        nonlocal num_asked
        num_asked += 1
        if num_asked == 3:
            stopping.set()
        exchange.hang_up()

    with endpoint(answer) as url:
        engine = RemoteEngine(Endpoint(url), MODEL)
        future = engine.submit(Request(image=IMAGES[0]))
        assert not wait([future], timeout=10).not_done and isinstance(future.exception(), GivenUp)
        engine.close()
    assert num_asked <= 4


def test_scores_and_features_of_an_image_go_in_requests_of_their_own() -> None:
    """Texts, scores and features may wait at the same time; each comes back for its own image."""
    sent: list[set[str]] = []

    def answer(exchange: Exchange) -> None:
        sent.append(exchange.fields.keys() & {"texts", "scores", "features"})
        if exchange.number in (1, 2):
            exchange.hang_up()  # unanswered texts are sent again
        else:
            exchange.answer_all()

    with endpoint(answer) as url, RemoteEngine(Endpoint(url), MODEL) as engine:
        futures = [engine.submit(Request(image=image)) for image in IMAGES]
        scores = engine.score([*IMAGES, IMAGES[0]], ["a dog"] * 20 + ["a cat"], ["a photo of"] * 20 + [None])
        features = engine.features(list(IMAGES))
        assert texts_of([future.result() for future in futures]) == CAPTIONS
    assert [score.logprob for score in scores[:20]] == [
        fake_score(image, "a dog", "a photo of") for image in IMAGES
    ]
    assert scores[20] == Score(logprob=fake_score(IMAGES[0], "a cat", None), num_tokens=1)
    for image, found in zip(IMAGES, features, strict=True):
        expected = fake_features(image)
        assert found.status is Status.OK
        assert found.qformer_features is not None and found.qformer_features.dtype == np.float32
        np.testing.assert_array_equal(found.qformer_features, expected.qformer_features)
        np.testing.assert_array_equal(found.pooler_output, expected.pooler_output)
    assert {frozenset(parts) for parts in sent} == {
        frozenset({"texts"}),
        frozenset({"scores"}),
        frozenset({"features"}),
    }


def test_scores_and_features_that_are_refused_or_fail_are_rows_with_a_status() -> None:
    def answer(exchange: Exchange) -> None:
        if exchange.scores:
            exchange.refuse(400, "bad_request", "scores is not a field")
        else:
            exchange.begin()
            exchange.break_off("overloaded")

    with endpoint(answer) as url, RemoteEngine(Endpoint(url), MODEL) as engine:
        (score,) = engine.score(list(IMAGES[:1]), ["a"], [None])
        (features,) = engine.features(list(IMAGES[:1]))
    assert (score.status, score.error) == (
        Status.REFUSED,
        "the endpoint answers 400: scores is not a field",
    )
    assert features.status is Status.FAILED and features.qformer_features is None


def test_a_job_that_stops_while_the_endpoint_is_gone_waits_for_no_scores() -> None:
    """The stage waits for them in one call, which would never return."""
    listen(lambda trouble: False)
    with endpoint(lambda exchange: exchange.hang_up()) as url:
        engine = RemoteEngine(Endpoint(url), MODEL)
        for read in (
            lambda: engine.score(list(IMAGES[:1]), ["a"], [None]),
            lambda: engine.features(list(IMAGES[:1])),
        ):
            with pytest.raises(GivenUp):
                in_time(read)
        engine.close()


def test_what_a_busy_endpoint_takes_after_the_job_has_given_up_is_waited_for_no_longer() -> None:
    """One request finds the endpoint gone while the endpoint still refuses another."""
    is_asked, given_up = threading.Event(), threading.Event()

    def answer(exchange: Exchange) -> None:
        if exchange.scores:
            exchange.hang_up()
            return
        is_asked.set()
        assert given_up.wait(10)
        exchange.refuse(503, "overloaded")

    listen(lambda trouble: trouble is None)
    with endpoint(answer) as url:
        engine = RemoteEngine(Endpoint(url), MODEL)
        ended: Future[None] = Future()

        def read_features() -> None:
            try:
                engine.features(list(IMAGES[:1]))
            except GivenUp:
                ended.set_result(None)

        reading = threading.Thread(target=read_features, daemon=True)
        reading.start()
        assert is_asked.wait(10)
        with pytest.raises(GivenUp):
            in_time(lambda: engine.score(list(IMAGES[:1]), ["a"], [None]))
        given_up.set()
        ended.result(timeout=5)
        engine.close()


@pytest.mark.parametrize("state", ["gone", "busy", "silent", "at work"])
def test_a_job_that_stops_waits_for_nothing_of_its_endpoint(
    monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """A text of the second pass, with stricter options, used to wait as long as the endpoint was gone."""
    monkeypatch.setattr(remote_engine, "TELL_EVERY_S", 0.01)
    is_asked, is_stopping, has_ended = threading.Event(), threading.Event(), threading.Event()
    listen(lambda trouble: not is_stopping.is_set())

    def answer(exchange: Exchange) -> None:
        if state == "busy":
            exchange.refuse(503, "overloaded")
        elif state == "at work":
            exchange.begin()
        is_asked.set()
        if state in ("silent", "at work"):
            has_ended.wait(10)
        exchange.hang_up()

    with endpoint(answer) as url:
        engine = RemoteEngine(Endpoint(url), MODEL)
        rows = [PendingRow(n, [engine.submit(Request(image=IMAGES[n]))]) for n in range(3)]
        reading: Future[object] = Future()

        def read_features() -> None:
            try:
                reading.set_result(engine.features(list(IMAGES[:1])))
            except GivenUp as error:
                reading.set_exception(error)

        threading.Thread(target=read_features, daemon=True).start()
        assert is_asked.wait(10)
        is_stopping.set()
        for row in rows:
            with pytest.raises(GivenUp):
                in_time(row.collect)
        with pytest.raises(GivenUp):
            reading.result(timeout=10)
        with pytest.raises(GivenUp):
            engine.submit(Request(image=IMAGES[0]))
        engine.close()
        has_ended.set()


def test_a_request_is_left_when_nobody_wants_any_of_its_texts() -> None:
    """Its slots at the endpoint are then free for others."""
    is_begun, is_left = threading.Event(), threading.Event()

    def answer(exchange: Exchange) -> None:
        exchange.begin()
        is_begun.set()
        try:
            while True:
                exchange.send(b"\n")
                time.sleep(0.01)
        except OSError:
            is_left.set()
            raise

    with endpoint(answer) as url:
        engine = RemoteEngine(Endpoint(url), MODEL)
        future = engine.submit(Request(image=IMAGES[0]))
        assert is_begun.wait(10)
        future.cancel()
        assert is_left.wait(10)
        engine.close()


def test_the_trial_before_work_ends_while_the_endpoint_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_engine, "TELL_EVERY_S", 0.01)
    monkeypatch.setattr(remote_engine, "ANSWER_S", 0.1)
    with (
        endpoint(lambda exchange: exchange.refuse(503, "overloaded")) as url,
        pytest.raises(EndpointError, match=f"{url} has given no outcome for 0.1 s"),
    ):
        EndpointConfig(endpoint=Endpoint(url)).with_info().try_out(Outputs(), GenerationOptions())


def test_the_trial_before_work_says_what_the_endpoint_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_engine, "TELL_EVERY_S", 0.001)  # how often it checks whether that takes long

    def config(url: str) -> EndpointConfig:
        return EndpointConfig(endpoint=Endpoint(url)).with_info()

    with endpoint(lambda exchange: exchange.answer_all()) as url:
        assert config(url).info() == MODEL
        config(url).try_out(
            Outputs(embed=("v=vision",), score=("s=caption",)), GenerationOptions(), ["a", "b"]
        )
    refusal = "the key alice has no right to send batch work"
    with (
        endpoint(lambda exchange: exchange.refuse(403, "no_batch_right", refusal)) as url,
        pytest.raises(EndpointError, match=f"{url} answers 403: {refusal}"),
    ):
        config(url).try_out(Outputs(), GenerationOptions())
    with (
        endpoint(lambda exchange: exchange.refuse(400, "bad_request", "too many beams")) as url,
        pytest.raises(EndpointError, match="the endpoint answers 400: too many beams"),
    ):
        config(url).try_out(Outputs(), GenerationOptions())
    with pytest.raises(EndpointError, match="gives no answer"):
        config(url)


@pytest.mark.parametrize(
    ("asked", "waits_s"), [(None, 1.0), ("5", 5.0), ("86400", 30.0), ("Thu, 26 Nov 2026 13:00:00 GMT", 1.0)]
)
def test_no_answer_makes_a_job_wait_for_long(asked, waits_s):
    """A job that stops waits until its pause ends."""
    assert pause_s(asked) == waits_s
