"""The HTTP interface without a cluster: what is refused, with which code, and that nothing is ignored."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from blip2_actor import Completion, GenerationOptions, ModelInfo, Result
from deploy.http.api import create_api
from deploy.http.errors import ApiError
from deploy.http.request_body import CaptionCall

IMAGE = b"encoded bytes"


class EchoService:
    """Captions a call with what was requested, so that a lost or changed field is visible."""

    def __init__(self) -> None:
        self.model = ModelInfo(model="demo", image_size_px=64, dtype="float32", digest="d")
        self.options = GenerationOptions(max_new_tokens=7)
        self.max_image_bytes = 1000
        self.timeout_s = 60.0
        self.num_in_flight = 0
        self.calls: list[CaptionCall] = []
        self.hold: asyncio.Event | None = None

    def admit(self) -> None:
        self.num_in_flight += 1

    def leave(self) -> None:
        self.num_in_flight -= 1

    async def caption(self, call: CaptionCall) -> tuple[Result, int | None, int | None]:
        self.calls.append(call)
        if self.hold is not None:
            await self.hold.wait()
        if call.prompt == "raise":
            raise RuntimeError("a secret of the service")
        texts = [f"text {n}" for n in range(call.options.num_return_sequences)]
        completions = tuple(
            Completion(text=text, token_ids=(4, 5), logprob=-1.0 - n, finish_reason="stop")
            for n, text in enumerate(texts)
        )
        return Result(completions=completions), 30, 20

    async def check_ready(self) -> None:
        raise ApiError(503, "not_ready", "no engine answers")


@pytest.fixture
def service() -> EchoService:
    return EchoService()


def ask(service: EchoService, method: str, path: str, **request: object) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(create_api(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **request)  # type: ignore[arg-type]

    return asyncio.run(send())


def post_form(service: EchoService, **fields: str) -> httpx.Response:
    return ask(service, "POST", "/v1/caption", files={"image": ("x.jpg", IMAGE)}, data=fields)


def post_json(service: EchoService, **fields: object) -> httpx.Response:
    document = {"image": base64.b64encode(IMAGE).decode()} | fields
    return ask(service, "POST", "/v1/caption", json=document)


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"type", "message"}
    return response.status_code, body["error"]["type"], body["error"]["message"]


def test_form_and_json_are_the_same_call(service: EchoService) -> None:
    options = {"num_beams": 3, "stop": ["."]}
    answers = [
        post_form(service, prompt="a photo of", options=json.dumps(options)),
        post_json(service, prompt="a photo of", options=options),
    ]
    assert [answer.status_code for answer in answers] == [200, 200]
    for call in service.calls:
        assert call.image == IMAGE
        assert call.prompt == "a photo of"
        # What the caller leaves out takes the default of the service, not that of the engine.
        assert call.options == GenerationOptions(num_beams=3, stop=(".",), max_new_tokens=7).resolve()


def test_the_answer_has_the_names_of_the_batch_output(service: EchoService) -> None:
    assert post_form(service).json() == {
        "caption": "text 0",
        "captions": None,
        "logprobs": None,
        "logprob": -1.0,
        "num_tokens": 2,
        "finish_reason": "stop",
        "status": "ok",
        "width": 30,
        "height": 20,
        "model": "demo",
    }
    several = post_json(service, options={"num_beams": 2, "num_return_sequences": 2}).json()
    assert several["captions"] == ["text 0", "text 1"]
    assert several["logprobs"] == [-1.0, -2.0]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"options": {"temprature": 1.0}}, "temprature"),
        ({"options": {"num_beams": "5"}}, "num_beams"),
        ({"options": {"num_beams": True}}, "num_beams"),
        ({"options": {"num_beams": 0}}, "num_beams"),
        ({"options": {"num_beams": 10_000}}, "num_beams"),
        ({"options": {"temperature": 0.5}}, "temperature"),
        ({"options": {"length_penalty": 1e999, "num_beams": 2}}, "length_penalty"),
        ({"options": {"stop": "."}}, "stop"),
        ({"options": {"stop": ["."] * 9}}, "stop"),
        ({"options": [1]}, "options"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x" * 9000}, "prompt"),
        ({"image": "not base64!"}, "image"),
        ({"image": 7}, "image"),
        ({"image": None}, "image"),
        ({"imgae": "x"}, "imgae"),
    ],
)
def test_wrong_fields_are_refused_by_name(
    service: EchoService, fields: dict[str, object], named: str
) -> None:
    # 1e999 is valid JSON, and infinity when it is read.
    body = json.dumps({"image": base64.b64encode(IMAGE).decode()} | fields).replace("Infinity", "1e999")
    headers = {"content-type": "application/json"}
    code, kind, message = error_of(ask(service, "POST", "/v1/caption", content=body, headers=headers))
    assert (code, kind) == (400, "bad_request")
    assert named in message
    assert not service.calls


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'{"image": NaN}', b"[" * 100_000])
def test_a_body_that_is_no_json_object(service: EchoService, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    service.max_image_bytes = 200_000
    assert error_of(ask(service, "POST", "/v1/caption", content=body, headers=headers))[:2] == (
        400,
        "bad_request",
    )


@pytest.mark.parametrize(
    "request_",
    [
        {"files": {"imgae": ("x.jpg", IMAGE)}},
        {"files": {"image": ("x.jpg", IMAGE), "prompt": ("p.txt", b"x")}},
        {"files": [("image", ("x.jpg", IMAGE)), ("image", ("y.jpg", IMAGE))]},
        {"files": {"other": (None, b"x")}, "data": {"image": "a string, not a file"}},
        {"files": {"image": ("x.jpg", IMAGE)}, "data": {"max_new_tokens": "5"}},
        {"files": {"image": ("x.jpg", IMAGE)}, "data": {"options": "max_new_tokens=5"}},
        {"content": b"no boundary", "headers": {"content-type": "multipart/form-data"}},
        {"content": b"--b\r\ncut", "headers": {"content-type": "multipart/form-data; boundary=b"}},
    ],
)
def test_a_form_that_cannot_be_read_is_400(service: EchoService, request_: dict[str, object]) -> None:
    assert error_of(ask(service, "POST", "/v1/caption", **request_))[:2] == (400, "bad_request")
    assert not service.calls


@pytest.mark.parametrize("content_type", ["image/jpeg", "text/plain", ""])
def test_another_content_type_is_415(service: EchoService, content_type: str) -> None:
    response = ask(service, "POST", "/v1/caption", content=IMAGE, headers={"content-type": content_type})
    assert error_of(response)[:2] == (415, "unsupported_media_type")


def test_a_body_beyond_the_limit_is_never_read_whole(service: EchoService) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 100 << 20:
            sent += 64 * 1024
            yield bytes(64 * 1024)

    headers = {"content-type": "multipart/form-data; boundary=b"}
    code, kind, _ = error_of(ask(service, "POST", "/v1/caption", content=endless(), headers=headers))
    assert (code, kind) == (413, "too_large")
    assert sent < 1 << 20


def test_an_image_beyond_the_limit_is_413(service: EchoService) -> None:
    big = {"image": ("x.jpg", bytes(service.max_image_bytes + 1))}
    assert error_of(ask(service, "POST", "/v1/caption", files=big))[:2] == (413, "too_large")


def test_a_request_that_takes_too_long_is_504_and_is_no_longer_counted(service: EchoService) -> None:
    service.timeout_s = 0.01
    service.hold = asyncio.Event()
    assert error_of(post_form(service))[:2] == (504, "timeout")
    assert service.num_in_flight == 0


def test_an_internal_error_reveals_nothing(service: EchoService) -> None:
    code, kind, message = error_of(post_json(service, prompt="raise"))
    assert (code, kind) == (500, "internal")
    assert "secret" not in message
    assert service.num_in_flight == 0


def test_no_engine_is_503_with_retry_after(service: EchoService) -> None:
    response = ask(service, "GET", "/healthz")
    assert error_of(response)[:2] == (503, "not_ready")
    assert response.headers["retry-after"] == "1"


def test_unknown_paths_and_methods_answer_in_the_same_shape(service: EchoService) -> None:
    assert error_of(ask(service, "GET", "/v2/caption"))[:2] == (404, "not_found")
    response = ask(service, "GET", "/v1/caption")
    assert error_of(response)[:2] == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_the_page_uses_routes_that_exist(service: EchoService) -> None:
    page = ask(service, "GET", "/")
    assert page.headers["content-type"].startswith("text/html")
    for path in ("v1/model", "v1/caption", "scene.png"):
        assert path in page.text
        assert ask(service, "GET", f"/{path}").status_code != 404
    scene = ask(service, "GET", "/scene.png")
    assert scene.content.startswith(b"\x89PNG") and scene.headers["x-caption"].endswith("background")


def test_only_the_demonstration_draws_scenes(service: EchoService) -> None:
    service.model = ModelInfo(model="some/model", image_size_px=64, dtype="float32", digest="d")
    assert error_of(ask(service, "GET", "/scene.png"))[0] == 404
    assert ask(service, "GET", "/v1/model").json()["model"] == "some/model"
