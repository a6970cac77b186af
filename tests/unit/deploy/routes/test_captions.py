"""`POST /v1/caption` and `/v1/captions`: every form of a request, and the columns of the answer."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import logging
from contextvars import copy_context
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from blip2_actor import Calibration, DecodedImage, GenerationOptions
from blip2_actor.testing import FakeEngineConfig, fake_features, fake_score
from deploy.guard.admission import Admission
from deploy.guard.callers import CALLER, Caller
from deploy.guard.cost import Cost
from deploy.guard.decoding import DecodingBySize
from deploy.http.answers import CaptionAnswer
from deploy.http.answers import fingerprint as fingerprint_of
from deploy.http.errors import ApiError
from deploy.http.served_model import ServedModel
from deploy.observe.request_record import AccessLog
from deploy.reuse.made import Made
from deploy.routes.captions import AT_ONCE, CaptionsBody, _caption_all
from deploy.service import Service
from deploy.settings import OnlineImageLimits
from deploy.work import TextToGenerate
from tests.unit.deploy.routes.engine_service import (
    EngineService,
    ask,
    base64_of,
    caption_of,
    data_uri,
    error_of,
    events_of,
    pixels_of,
    png,
    post,
)

IMAGE = png(1)
QUESTION = "Question: what color is it? Answer:"


@pytest.fixture(scope="module")
def service() -> EngineService:
    return EngineService(FakeEngineConfig(model="demo", refuses_on=(caption_of(png(666)),)))


def forms(**fields: object) -> list[dict]:
    """The same request, in every form that clients send."""
    as_text = {n: v if n == "prompt" else json.dumps(v) for n, v in fields.items()}
    in_json = {"content-type": "application/json; charset=utf-8"}
    with_line_breaks = base64_of(IMAGE)[:76] + "\r\n" + base64_of(IMAGE)[76:] + "\n"
    part = b'--b\r\nContent-Disposition: form-data; name="image"\r\nContent-Type: image/png\r\n\r\n%s\r\n'
    return [
        {"files": {"image": ("x.png", IMAGE)}, "data": as_text},
        {"json": {"image": base64_of(IMAGE)} | fields},
        {"json": {"image": with_line_breaks} | fields},
        {"json": {"image": data_uri(IMAGE)} | fields},
        {"content": json.dumps({"image": base64_of(IMAGE)} | fields).encode(), "headers": in_json},
        *(
            {"content": IMAGE, "params": as_text, "headers": {"content-type": media} if media else {}}
            for media in ("image/png", "application/octet-stream", "application/x-www-form-urlencoded", "")
        ),
        {
            "content": part % IMAGE + b"--b--\r\n",
            "params": as_text,
            "headers": {"content-type": "multipart/form-data; boundary=b"},
        },
    ]


@pytest.mark.parametrize("number", range(10))
def test_every_form_of_a_request_is_the_same_call(service: EngineService, number: int) -> None:
    fields = {"prompt": "a photo of", "options": {"num_beams": 3, "num_return_sequences": 2, "stop": ["."]}}
    response = ask(service, "POST", "/v1/caption", **forms(**fields)[number])
    assert response.status_code == 200, response.text
    text = caption_of(IMAGE, "a photo of")
    assert response.json()["captions"] == [text, f"{text} 1"]
    # An option that the caller leaves out takes the service's default, not the engine's.
    assert service.costs[-1] == Cost(slots=3, steps=7)
    assert service.num_in_flight == 0


def test_options_may_stand_in_the_query_and_in_the_body_each_once(service: EngineService) -> None:
    """Options given in two places used to be refused as if one had been given twice."""
    image, files = {"image": base64_of(IMAGE)}, {"image": ("a.png", IMAGE)}
    bodies: list[dict[str, Any]] = [
        {"json": image | {"options": {"num_beams": 2}}},
        {"files": files, "data": {"num_beams": "2"}},
        {"files": files, "data": {"options": '{"num_beams": 2}'}},
    ]
    for body in bodies:
        service.costs.clear()
        answer = ask(service, "POST", "/v1/caption", params={"max_new_tokens": 3}, **body)
        assert answer.status_code == 200, answer.text
        assert service.costs == [Cost(slots=2, steps=3)]
        twice = ask(service, "POST", "/v1/caption", params={"num_beams": 3}, **body)
        assert error_of(twice) == (400, "bad_request", "num_beams must be given once")


def test_options_may_stand_in_the_query_under_their_own_names(service: EngineService) -> None:
    query = [("num_beams", "2"), ("num_return_sequences", "2"), ("stop", "a"), ("stop", "b"), ("prompt", "7")]
    headers = {"content-type": "image/png"}
    answer = ask(service, "POST", "/v1/caption", content=IMAGE, params=query, headers=headers).json()
    assert answer["captions"][0] == caption_of(IMAGE, "7")


def test_the_answer_has_the_columns_of_the_batch_output(service: EngineService) -> None:
    answer = post(service, "/v1/caption", image=base64_of(IMAGE)).json()
    fingerprint = answer.pop("fingerprint")
    assert answer == {
        "caption": caption_of(IMAGE),
        "captions": None,
        "logprobs": None,
        "logprob": -1.5,
        "num_tokens": 3,
        "finish_reason": "stop",
        "confidence": None,
        "flags": [],
        "token_ids": [1, 2, 3],
        "status": "ok",
        "error": None,
        "width": 32,
        "height": 32,
        "sha256": hashlib.sha256(IMAGE).hexdigest(),
        "model": "demo",
    }
    assert len(fingerprint) == 64
    text = TextToGenerate(prompt=None, options=service.first.options)
    assert fingerprint == fingerprint_of(service.first.info, text)
    assert fingerprint != fingerprint_of(replace(service.first.info, quantize="int8"), text)
    other = post(service, "/v1/caption", image=base64_of(IMAGE), prompt="a").json()
    assert other["fingerprint"] != fingerprint and other["flags"] == []
    echo = post(service, "/v1/caption", image=base64_of(IMAGE), prompt="a photo of").json()
    assert echo["flags"] == ["echoes_prompt"]


def test_a_caption_says_how_sure_it_is_if_it_is_made_as_the_calibrated_ones(service: EngineService) -> None:
    plain = service.first
    calibration = Calibration(
        coefficients={"log_odds": 0.0, "num_tokens": 1.0},
        intercept=0.0,
        curve=((0.0, 0.0), (10.0, 1.0)),
        model=plain.info.digest,
        options=asdict(plain.options),
    )
    service._models.first = replace(plain, calibration=calibration, min_confidence=0.5)
    answer = post(service, "/v1/caption", image=base64_of(IMAGE)).json()
    assert answer["confidence"] == pytest.approx(0.3)
    assert answer["flags"] == ["abstained"] and answer["caption"] == caption_of(IMAGE)
    for other in ({"prompt": "a"}, {"options": {"num_beams": 3}}):
        answer = post(service, "/v1/caption", image=base64_of(IMAGE), **other).json()
        assert answer["confidence"] is None and answer["flags"] == []
    service._models.first = plain


def test_everything_that_is_asked_of_an_image_costs_one_encode(service: EngineService) -> None:
    before = service.captioner.stats().num_images_encoded
    answer = post(
        service,
        "/v1/caption",
        image=base64_of(IMAGE),
        prompt="a photo of",
        ask={"color": QUESTION, "count": "Question: how many? Answer:"},
        choices=["a dog", "a cat", "a red circle"],
        score=["a cat"],
        embed=["vision", "qformer", "queries"],
        attention=True,
    ).json()
    assert service.captioner.stats().num_images_encoded == before + 1
    assert service.costs[-1].slots == 3
    assert answer["answers"]["color"]["text"] == caption_of(IMAGE, QUESTION)
    samples = {"do_sample": True, "num_return_sequences": 3}
    post(service, "/v1/caption", image=base64_of(IMAGE), ask={"color": QUESTION}, options=samples)
    assert service.costs[-1].slots == 3 + 1  # an answer is one text
    assert list(answer["answers"]) == ["color", "count"]
    pixels = pixels_of(IMAGE)
    expected = [fake_score(pixels, text, "a photo of") for text in ("a dog", "a cat", "a red circle")]
    assert [choice["logprob"] for choice in answer["choices"]] == expected
    probabilities = np.exp(expected) / np.exp(expected).sum()
    assert [choice["probability"] for choice in answer["choices"]] == pytest.approx(probabilities)
    [score] = answer["scores"]
    assert score == {"text": "a cat", "logprob": expected[1], "num_tokens": 1, "loss": -expected[1]}
    features = fake_features(pixels, with_attention_maps=True)
    assert features.attention_grid is not None
    assert answer["attention"] == features.attention_grid.tolist()
    assert features.qformer_features is not None and features.pooler_output is not None
    assert answer["embeddings"]["vision"] == features.pooler_output.tolist()
    assert answer["embeddings"]["qformer"] == features.qformer_features.mean(axis=0).tolist()
    assert answer["embeddings"]["queries"] == features.qformer_features.tolist()
    CaptionAnswer.model_validate(answer, strict=True)


def test_each_of_several_captions_has_its_flags(service: EngineService) -> None:
    several = {"do_sample": True, "num_return_sequences": 2}
    answer = post(service, "/v1/caption", image=base64_of(IMAGE), prompt="a photo of", options=several).json()
    assert len(answer["captions"]) == len(answer["logprobs"]) == 2
    assert answer["captions_flags"] == [["echoes_prompt"]] * 2
    CaptionAnswer.model_validate(answer, strict=True)


def test_a_stream_joins_to_the_plain_answer(service: EngineService) -> None:
    fields = {"image": base64_of(IMAGE), "prompt": "été ☃", "ask": {"color": QUESTION}}
    plain = post(service, "/v1/caption", **fields).json()
    events = events_of(post(service, "/v1/caption", stream=True, **fields))
    assert events[-1] == ("answer", plain)
    pieces = [data for name, data in events if name == "text"]
    assert len(events) == len(pieces) + 1 > 3
    for output, text in (("caption", plain["caption"]), ("color", plain["answers"]["color"]["text"])):
        assert "".join(piece["text"] for piece in pieces if piece["output"] == output) == text
    assert service.num_in_flight == 0


def test_an_error_before_the_first_piece_is_an_ordinary_answer(service: EngineService) -> None:
    response = post(service, "/v1/caption", image=base64_of(b"no image"), stream=True)
    assert error_of(response)[:2] == (422, "undecodable")
    assert response.headers["content-type"] == "application/json"


def test_an_error_after_the_first_piece_is_the_last_event(service: EngineService) -> None:
    image = png(666)
    fields = {"image": base64_of(image), "ask": {"a": QUESTION}, "stream": True}
    assert error_of(post(service, "/v1/caption", image=base64_of(image)))[:2] == (422, "refused")
    *pieces, (name, data) = events_of(post(service, "/v1/caption", **fields))
    assert (name, data["error"]["type"]) == ("error", "refused")
    assert pieces and service.num_in_flight == 0


@pytest.mark.parametrize(
    ("fields", "code", "kind", "named"),
    [
        ({"ask": {"": "x"}}, 400, "bad_request", "ask"),
        ({"ask": {"caption": QUESTION}}, 400, "bad_request", "ask: 'caption' is the name"),
        ({"ask": {"caption": QUESTION}, "stream": True}, 400, "bad_request", "give the prompt another one"),
        ({"ask": {"a": 5}}, 400, "bad_request", "ask.a"),
        ({"ask": {str(n): "x" for n in range(17)}}, 400, "bad_request", "ask"),
        ({"choices": "a"}, 400, "bad_request", "choices"),
        ({"score": [""] * 65}, 400, "bad_request", "score"),
        ({"score": ["x" * 101]}, 422, "refused", "too long"),
        ({"embed": ["colors"]}, 400, "bad_request", "embed"),
        ({"stream": "yes"}, 400, "bad_request", "stream"),
        ({"match": ["a dog"]}, 400, "unsupported", "--score-model"),
        ({"embed": ["contrastive"]}, 400, "unsupported", "--score-model"),
        ({"image": "http://169.254.169.254/latest"}, 400, "url_refused", "URL"),
        ({"image": "data:image/png,abc"}, 400, "bad_request", "data URI"),
        ({"image": base64_of(bytes(20_001))}, 413, "too_large", "20000"),
        ({"image": base64_of(b"")}, 422, "missing_image", "image"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    service: EngineService, fields: dict, code: int, kind: str, named: str
) -> None:
    response = post(service, "/v1/caption", **{"image": base64_of(IMAGE)} | fields)
    assert error_of(response)[:2] == (code, kind)
    assert named in error_of(response)[2]


def test_many_images_are_answered_as_they_finish(service: EngineService) -> None:
    images = [png(seed) for seed in range(12)]
    images[3], images[7] = b"no image", png(666)
    response = post(service, "/v1/captions", images=[base64_of(image) for image in images])
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = {line["index"]: line for line in map(json.loads, response.text.splitlines())}
    assert sorted(lines) == list(range(12))
    assert (lines[3]["status"], lines[7]["status"]) == ("undecodable", "refused")
    for index in set(range(12)) - {3, 7}:
        plain = post(service, "/v1/caption", image=base64_of(images[index])).json()
        assert lines[index] == {"index": index} | plain
    files = [("images", ("x.png", image)) for image in images[:2]]
    form = ask(service, "POST", "/v1/captions", files=files, headers={"accept": "text/event-stream"})
    found = sorted(data["index"] for _, data in events_of(form))
    assert found == [0, 1] and service.num_in_flight == 0


def test_one_of_many_images_that_is_none_does_not_refuse_the_others(service: EngineService) -> None:
    wrong = ["no base64!", "https://example.com/a.png"]
    response = post(service, "/v1/captions", images=[base64_of(png(1)), *wrong])
    lines = {line["index"]: line for line in map(json.loads, response.text.splitlines())}
    assert [lines[n]["status"] for n in range(3)] == ["ok", "bad_request", "url_refused"]
    assert "base64" in lines[1]["error"]


@pytest.mark.parametrize("value", [None, 5, {}, ["x"]], ids=repr)
def test_images_that_are_no_strings_refuse_the_request(service: EngineService, value: object) -> None:
    """The interface documents strings, so a client that sends other types is wrong everywhere."""
    response = post(service, "/v1/captions", images=[base64_of(png(1)), value])
    assert error_of(response)[:2] == (400, "bad_request")
    assert "each of images must be a string" in response.text


def test_the_images_of_one_request_come_a_few_at_a_time(
    service: EngineService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request must not fill the queue ahead of all others."""
    running: list[int] = []
    most = 0
    make = service.make

    async def watched(*given: Any) -> Made:
        nonlocal most
        running.append(1)
        most = max(most, len(running))
        for _ in range(5):
            await asyncio.sleep(0)
        running.pop()
        return await make(*given)

    monkeypatch.setattr(service, "make", watched)
    post(service, "/v1/captions", images=[base64_of(IMAGE)] * 20)
    assert most == AT_ONCE


def test_many_images_are_one_request_of_their_caller(caplog: pytest.LogCaptureFixture) -> None:
    """Requests admitted one by one at the same time used to use up the quota of their own caller."""
    service = EngineService()
    service._admission = Admission(slots=8, max_in_flight=1, timeout_s=60)
    service.api.add_middleware(AccessLog)

    def send(quota: int) -> httpx.Response:
        CALLER.set(Caller(name="alice", max_in_flight=quota))
        return post(service, "/v1/captions", images=[base64_of(png(seed)) for seed in range(10)])

    with caplog.at_level(logging.INFO, "ray.serve"):
        answer = copy_context().run(send, 1)
    assert [json.loads(line)["status"] for line in answer.text.splitlines()] == ["ok"] * 10
    [logged] = [vars(record) for record in caplog.records if record.message == "request"]
    assert (logged["slots"], logged["steps"]) == (10, 7)
    refused = copy_context().run(send, 0)
    assert error_of(refused)[:2] == (429, "quota") and refused.headers["retry-after"] == "1"


class SlowService(EngineService):
    """Decodes the first image at once, and the others when the test allows it."""

    def __init__(self, timeout_s: float, first: bytes | None = None) -> None:
        super().__init__()
        self._admission = Admission(slots=8, max_in_flight=8, timeout_s=timeout_s)
        self._first = first
        self.may_go_on = asyncio.Event()

    async def decode(self, model: ServedModel, image: bytes) -> DecodedImage:
        if image != self._first:
            await self.may_go_on.wait()
        return await super().decode(model, image)


def test_a_drain_waits_for_all_images_of_a_request_that_has_begun() -> None:
    async def run() -> list[str]:
        service = SlowService(60)
        body = {"images": [base64_of(png(seed)) for seed in range(2 * AT_ONCE)]}
        transport = httpx.ASGITransport(service.api)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answering = asyncio.create_task(client.post("/v1/captions", json=body))
            while not service.num_in_flight:
                await asyncio.sleep(0.01)
            draining = asyncio.create_task(service._admission.drain())
            await asyncio.sleep(0)
            assert not draining.done()
            service.may_go_on.set()
            answer = await answering
            await draining
        return [json.loads(line)["status"] for line in answer.text.splitlines()]

    assert asyncio.run(run()) == ["ok"] * 2 * AT_ONCE


def test_the_time_of_a_request_is_that_of_all_its_images() -> None:
    """The time used to restart with each image, so that a request outlasted the limit of a drain."""
    images = [png(seed) for seed in range(2 * AT_ONCE)]
    answers = []
    for first in (images[0], None):
        service = SlowService(0.5, first)
        answers.append(post(service, "/v1/captions", images=[base64_of(image) for image in images]))
    lines = [json.loads(line) for line in answers[0].text.splitlines()]
    assert [line["index"] for line in lines] == list(range(len(images)))
    assert [line["status"] for line in lines] == ["ok"] + ["timeout"] * (len(images) - 1)
    assert error_of(answers[1])[:2] == (504, "timeout")


def test_an_image_whose_line_was_not_sent_in_time_has_one_too() -> None:
    """A slow client used to get no line for the image that was being sent when the time ran out."""
    service = EngineService()
    service._admission = Admission(slots=8, max_in_flight=8, timeout_s=0.5)
    images = [png(seed) for seed in range(3)]
    body = CaptionsBody.model_validate({"images": images}, context={"image_policy": service.image_policy})
    sent: list[dict[str, Any]] = []

    async def send(line: dict[str, Any]) -> None:
        if len(sent) == 1:
            await asyncio.sleep(1)  # interrupted when the time runs out
        sent.append(line)

    asyncio.run(_caption_all(service, body, send))
    assert sorted(line["index"] for line in sent) == [0, 1, 2]


def test_many_images_are_bounded(service: EngineService) -> None:
    too_many = post(service, "/v1/captions", images=[base64_of(b"x")] * 65)
    assert error_of(too_many)[:2] == (400, "bad_request")
    assert error_of(post(service, "/v1/captions", images=[]))[:2] == (400, "bad_request")
    big = [base64_of(bytes(19_000))] * 64
    assert error_of(post(service, "/v1/captions", images=big))[:2] == (413, "too_large")


def test_a_full_service_refuses_streams_with_a_code() -> None:
    service = EngineService()
    service.full = ApiError(503, "overloaded", "full")
    for stream in (False, True):
        response = post(service, "/v1/caption", image=base64_of(IMAGE), stream=stream)
        assert error_of(response)[:2] == (503, "overloaded")
        assert response.headers["retry-after"] == "1"


def test_the_options_of_the_service_are_those_of_answers_too() -> None:
    """An answer reports only its best text, however many captions the service makes."""
    service = EngineService(options=GenerationOptions(num_beams=4, num_return_sequences=4))
    answer = post(service, "/v1/caption", image=base64_of(IMAGE), ask={"color": QUESTION}).json()
    assert len(answer["captions"]) == 4
    assert answer["answers"]["color"]["text"] == caption_of(IMAGE, QUESTION)


def test_an_accepted_image_without_its_end_is_flagged() -> None:
    """The job gives such rows the same flag, but the endpoint used to refuse the setting."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(file, "JPEG")
    whole = file.getvalue()

    async def answers() -> list[tuple[int, object]]:
        service = EngineService()
        service._decoding = DecodingBySize(accepting, 1)
        service.decode = partial(Service.decode, service)  # type: ignore[method-assign]
        transport = httpx.ASGITransport(service.api)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            sent = [await client.post("/v1/caption", content=data) for data in (whole, whole[:-200])]
        return [(answer.status_code, answer.json()["flags"]) for answer in sent]

    accepting = OnlineImageLimits(accept_truncated=True)
    assert asyncio.run(answers()) == [(200, []), (200, ["truncated"])]
