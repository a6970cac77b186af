"""Bad requests are refused with the right code, and nothing is ignored; no cluster is needed."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from tests.unit.deploy.routes.engine_service import EngineService, ask, base64_of, error_of, png

IMAGE = png()


@pytest.fixture(scope="module")
def engine_service() -> EngineService:
    return EngineService()


@pytest.fixture
def service(engine_service: EngineService) -> Iterator[EngineService]:
    """Each test ends as it began: nothing is in flight."""
    engine_service.costs.clear()
    yield engine_service
    assert engine_service.num_in_flight == 0


def post_json(service: EngineService, body: bytes) -> httpx.Response:
    headers = {"content-type": "application/json"}
    return ask(service, "POST", "/v1/caption", content=body, headers=headers)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"options": {"temprature": 1.0}}, "temprature"),
        ({"options": {"num_beams": "5"}}, "num_beams"),
        ({"options": {"num_beams": True}}, "num_beams"),
        ({"options": {"num_beams": 0}}, "num_beams"),
        ({"options": {"num_beams": 10_000}}, "num_beams"),
        ({"options": {"max_length": 20}}, "give max_new_tokens"),
        ({"options": {"bad_words_ids": [["cat"]]}}, "bad_words_ids"),
        ({"options": {"bad_words_ids": [list(range(300))]}}, "bad_words_ids must have at most 256 token ids"),
        (
            {"options": {"suppress_tokens": ["x"] * 99_000}},
            "suppress_tokens must have at most 8192 characters",
        ),
        ({"options": {"temperature": 0.5}}, "temperature"),
        ({"options": {"length_penalty": 1e999, "num_beams": 2}}, "length_penalty"),
        ({"options": {"stop": "."}}, "stop"),
        ({"options": {"stop": ["."] * 9}}, "64 characters, got 9 of at most 1"),
        ({"options": {"min_new_tokens": 8}}, "max_new_tokens=7 of the service counts until another value"),
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
    service: EngineService, fields: dict[str, object], named: str
) -> None:
    # 1e999 is valid JSON, and is read as infinity
    body = json.dumps({"image": base64_of(IMAGE)} | fields).replace("Infinity", "1e999")
    code, kind, message = error_of(post_json(service, body.encode()))
    assert (code, kind) == (400, "bad_request")
    assert named in message
    assert not service.costs


COMMAS = b"[" + b"[]," * 100_001 + b"[]]"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'{"image": NaN}', b"[" * 100_000, COMMAS])
def test_a_body_that_is_no_json_object(service: EngineService, body: bytes) -> None:
    assert error_of(post_json(service, body))[:2] == (400, "bad_request")


@pytest.mark.parametrize(
    "request_",
    [
        {"files": {"imgae": ("x.jpg", IMAGE)}},
        {"files": {"image": ("x.jpg", IMAGE), "prompt": ("p.txt", b"x")}},
        {"files": [("image", ("x.jpg", IMAGE)), ("image", ("y.jpg", IMAGE))]},
        {"files": {"other": (None, b"x")}, "data": {"image": "a string, not a file"}},
        {"files": {"image": ("x.jpg", IMAGE)}, "data": {"max_new_tokens": "many"}},
        {"files": {"image": ("x.jpg", IMAGE)}, "data": {"max_new_tokens": "5", "options": "{}"}},
        {"files": {"image": ("x.jpg", IMAGE)}, "data": {"prompt": "a"}, "params": {"prompt": "a"}},
        {"files": [("image", ("x.jpg", b"x"))] * 300},
        {"files": {"image": ("x.jpg", IMAGE)}, "data": {"prompt": b"\xff\xfe"}},
        {"files": {"image": ("x.jpg", IMAGE)}, "data": {"prompt": "caf\xe9".encode("latin-1")}},
        {"files": {"image": ("x.jpg", IMAGE)}, "params": {"max_new_tokens": "5", "color": "1"}},
        {"files": {"image": ("x.jpg", IMAGE)}, "data": {"options": "max_new_tokens=5"}},
        {"content": b"no boundary", "headers": {"content-type": "multipart/form-data"}},
        {"content": b"--b\r\ncut", "headers": {"content-type": "multipart/form-data; boundary=b"}},
    ],
)
def test_a_form_that_cannot_be_read_is_400(service: EngineService, request_: dict[str, object]) -> None:
    assert error_of(ask(service, "POST", "/v1/caption", **request_))[:2] == (400, "bad_request")
    assert not service.costs


@pytest.mark.parametrize(
    ("path", "content_type", "body"),
    [
        ("/v1/caption", "text/plain", IMAGE),
        ("/v1/caption", "multipart/mixed; boundary=b", IMAGE),
        ("/v1/caption", "application/x-www-form-urlencoded", b"image=iVBORw0KGgo&prompt=a"),
        ("/v1/captions", "image/png", IMAGE),
        ("/v1/rerank", "multipart/form-data; boundary=b", IMAGE),
        ("/v1/chat/completions", "image/png", IMAGE),
        ("/", "text/plain", IMAGE),
    ],
)
def test_another_content_type_is_415(
    service: EngineService, path: str, content_type: str, body: bytes
) -> None:
    response = ask(service, "POST", path, content=body, headers={"content-type": content_type})
    assert error_of(response)[:2] == (415, "unsupported_media_type")


@pytest.mark.parametrize("charset", ["utf-7", "punycode", "zlib_codec", "klingon"])
def test_a_form_is_in_utf8(service: EngineService, charset: str) -> None:
    """Some charsets decode in quadratic time, and others do not exist."""
    body = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nab\r\n--b--\r\n'
    headers = {"content-type": f"multipart/form-data; boundary=b; charset={charset}"}
    response = ask(service, "POST", "/v1/caption", content=body, headers=headers)
    assert error_of(response)[:2] == (400, "bad_request") and "UTF-8" in response.text


@pytest.mark.parametrize("text", [r'"\ud83d": 1', r'"prompt": "\ud83d"', r'"options": {"\ude00": 1}'])
def test_half_a_character_anywhere_in_json_is_400(service: EngineService, text: str) -> None:
    """A lone surrogate in a field's or option's name used to cause a 500: the message could not be sent."""
    body = f'{{"image": "{base64_of(IMAGE)}", {text}}}'.encode()
    code, kind, message = error_of(post_json(service, body))
    assert (code, kind) == (400, "bad_request") and "surrogate" in message
    whole = f'{{"image": "{base64_of(IMAGE)}", "prompt": "\\ud83d\\ude00"}}'.encode()
    assert post_json(service, whole).json()["caption"].startswith("😀")


def test_json_of_a_great_many_values_is_400(service: EngineService, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory and time of parsing depend on the number of values, not of bytes."""
    body = f'{{"image": "{base64_of(IMAGE)}", "prompt": "a, b, c"}}'.encode()
    monkeypatch.setattr("deploy.http.request_body.MAX_COMMAS", 3)
    assert post_json(service, body).status_code == 200
    monkeypatch.setattr("deploy.http.request_body.MAX_COMMAS", 2)
    code, kind, message = error_of(post_json(service, body))
    assert (code, kind) == (400, "bad_request") and "at most 2 commas" in message


@pytest.mark.parametrize("name", ["prompt", "options", "other"])
def test_json_that_is_too_deep_is_400(service: EngineService, name: str) -> None:
    """Later checks have less stack than the parser: a list in an option used to cause a 500."""
    for depth in (63, 64, 500, 960, 100_000):
        nested = "[" * (depth - 1) + "]" * (depth - 1)
        value = f'{{"stop": {nested[1:-1]}}}' if name == "options" else nested
        # Beyond 64 KiB, a body is parsed in a thread, whose stack is larger.
        body = f'{{"image": "{base64_of(IMAGE)}", "{name}": {value}}}'.encode() + b" " * 70_000
        code, kind, message = error_of(post_json(service, body))
        assert (code, kind) == (400, "bad_request")
        assert ("at most 64 lists or objects in one another" in message) == (depth > 64)


def test_the_message_names_what_is_misspelled(service: EngineService) -> None:
    """The message does not say that the image is missing, which is only the consequence."""
    for files in ({"file": ("a.png", IMAGE)}, {"imgae": ("a.png", IMAGE)}):
        [name] = files
        assert f"{name} is not a field" in error_of(ask(service, "POST", "/v1/caption", files=files))[2]
    as_text = {"image": (None, IMAGE)}
    assert "-F" in error_of(ask(service, "POST", "/v1/caption", files=as_text))[2]


@pytest.mark.parametrize(
    ("query", "files", "said"),
    [
        ("", {"images": ("a.png", IMAGE)}, "images is not a field; .*; did you mean image[?]"),
        ("?max_tokens=5", {}, "max_tokens is not a field; .*; did you mean max_new_tokens[?]"),
        ("?Prompt=a+red", {}, "Prompt is not a field; .*; did you mean prompt[?]"),
        ("?num_beams=five", {}, "num_beams must be JSON, such as 5, true or .*, got 'five'$"),
        ("?choices=red", {}, r'choices must be JSON, such as .*\["red", "blue"\], got \'red\'$'),
    ],
)
def test_the_message_says_what_to_type(
    service: EngineService, query: str, files: dict[str, tuple[str, bytes]], said: str
) -> None:
    """The message used to name a position in a one-word text, not the option that was meant."""
    response = ask(service, "POST", f"/v1/caption{query}", files=files or {"image": ("a.png", IMAGE)})
    assert re.match(said, error_of(response)[2])


def test_an_option_in_json_is_told_its_place(service: EngineService) -> None:
    response = ask(service, "POST", "/v1/caption", json={"image": base64_of(IMAGE), "num_beams": 2})
    assert error_of(response)[2] == "num_beams must stand in options in JSON"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"image": "AAAA"}', "Content-Type must be application/json"),
        (IMAGE.translate(None, b"\0\r\n"), "curl -d leaves out some"),
        (b"image=@photo.jpg", "Content-Type must be multipart/form-data"),
    ],
)
def test_what_curl_sends_by_mistake_is_told(service: EngineService, body: bytes, said: str) -> None:
    """All of these used to be `undecodable`: the bytes are not a readable JPEG."""
    header = {"content-type": "application/x-www-form-urlencoded"}
    code, _, message = error_of(ask(service, "POST", "/v1/caption", content=body, headers=header))
    assert (code, said in message) == (415, True), message


@pytest.mark.parametrize("start", [b"GIF89a=\0", b"RIFF0=\0\0WEBPVP8 ", b"BM6=\0\0"])
def test_an_image_whose_first_bytes_look_like_a_form_is_an_image(
    service: EngineService, start: bytes
) -> None:
    header = {"content-type": "application/x-www-form-urlencoded"}
    response = ask(service, "POST", "/v1/caption", content=start + IMAGE, headers=header)
    assert response.status_code != 415, response.text


def test_digits_that_python_does_not_read_are_refused_without_its_advice(service: EngineService) -> None:
    message = error_of(post_json(service, b'{"image": ' + b"1" * 5000 + b"}"))[2]
    assert message == "body must have integers of at most 4300 digits"


@pytest.mark.parametrize(
    ("method", "path", "code", "kind", "said"),
    [
        ("GET", "/v1/captoin", 404, "not_found", "there is no '/v1/captoin'; GET /docs lists the routes"),
        ("OPTIONS", "/v2/caption", 404, "not_found", "there is no '/v2/caption'; GET /docs lists the routes"),
        (
            "GET",
            "/v1/caption",
            405,
            "method_not_allowed",
            "'/v1/caption' must be called with POST, OPTIONS, got GET",
        ),
    ],
)
def test_a_path_or_method_that_is_not_there_is_named(
    service: EngineService, method: str, path: str, code: int, kind: str, said: str
) -> None:
    response = ask(service, method, path)
    assert error_of(response) == (code, kind, said)
    assert response.headers.get("allow") == ("POST, OPTIONS" if code == 405 else None)


def chat_with(part: object) -> dict[str, object]:
    return {"model": "demo", "messages": [{"role": "user", "content": part}]}


@pytest.mark.parametrize(
    ("path", "fields", "said"),
    [
        ("/", {"input": "x"}, "input is not a field; the fields are inputs, image, parameters, model"),
        ("/", {"inputs": 5}, "inputs must be a string"),
        ("/", {"image": 5}, "image must be a string"),
        ("/", {}, "inputs or image must be given, one of them"),
        ("/", {"inputs": "AAAA", "image": "AAAA"}, "inputs or image must be given, one of them"),
        ("/v1/embeddings", {"model": "demo", "input": 5}, "input must be a valid string, got 5"),
        ("/v1/embeddings", {"model": "demo", "input": [[1]]}, "input.0 must be a valid string, got [1]"),
        ("/v1/embeddings", {"model": "demo", "input": []}, "input must have at least 1 item, not 0, got []"),
        (
            "/v1/rerank",
            {"query": {"image": 5}, "documents": ["a"]},
            "query.image must be a valid string, got 5",
        ),
        ("/v1/rerank", {"query": {"imge": "x"}, "documents": ["a"]}, "query.imge is not a field"),
        ("/v1/rerank", {"query": {"image": "AAAA", "id": 1}, "documents": ["a"]}, "query.id is not a field"),
        ("/v1/rerank", {"query": "a", "documents": [{"text": 5}]}, "documents.0.text must be a valid string"),
        ("/v1/chat/completions", chat_with(5), "messages.0.content must be a valid string, got 5"),
        ("/v1/chat/completions", chat_with([5]), "messages.0.content.0 must be a valid dictionary, got 5"),
        ("/", {"inputs": "AAAA", "parameters": 5}, "parameters must be a valid dictionary, got 5"),
        ("/v1/chat/completions", chat_with([{"type": "text"}]), "messages.0.content.0.text must be given"),
        ("/v1/chat/completions", chat_with([{"text": "x"}]), "messages.0.content.0.type must be given"),
        (
            "/v1/chat/completions",
            chat_with([{"type": "image_url", "image_url": {"url": "x", "detail": "y"}}]),
            "messages.0.content.0.image_url.detail must be 'auto'",
        ),
        (
            "/v1/chat/completions",
            chat_with([{"type": "text", "text": "x", "image_url": "y"}]),
            "messages.0.content.0.image_url is not a field",
        ),
        ("/v1/caption", {"ask": {"": "x"}}, "ask must have at least 1 character"),
        ("/v1/caption", {"ask": {"str": 5}}, "ask.str must be a valid string"),
    ],
)
def test_the_message_says_where_the_wrong_value_is(
    service: EngineService, path: str, fields: dict[str, object], said: str
) -> None:
    """The message used to contain names of Python classes, or of a field that no request has."""
    body = fields if path != "/v1/caption" else {"image": base64_of(IMAGE)} | fields
    assert error_of(ask(service, "POST", path, json=body))[2].startswith(said)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", chat_with([0] * 20_000)),
        ("/v1/chat/completions", chat_with("x") | {"stop": [0] * 20_000}),
        ("/v1/chat/completions", chat_with("x") | {"stop": ["x"] * 98_000 + [0] * 900}),
        ("/v1/caption", {f"unknown{i}": 0 for i in range(20_000)}),
    ],
)
def test_a_great_many_wrong_values_take_no_time(
    service: EngineService, path: str, fields: dict[str, object]
) -> None:
    """40 kB of zeros in a message used to stop the event loop, and so all other requests, for 12 s."""
    began_s = time.process_time()
    response = ask(service, "POST", path, json=fields)
    assert error_of(response)[:2] == (400, "bad_request")
    assert time.process_time() - began_s < 1


def test_a_name_given_twice_is_found_at_once_among_many(service: EngineService) -> None:
    """64 kB used to take 0.8 s on the event loop, and 900 kB minutes in a thread."""
    names = ",".join(f'"{i}": 0' for i in range(20_000))
    began_s = time.process_time()
    assert "'19999' is given twice" in error_of(post_json(service, f'{{{names}, "19999": 0}}'.encode()))[2]
    assert time.process_time() - began_s < 1


def test_a_message_is_short_whatever_the_name_of_a_field(service: EngineService) -> None:
    """The name used to be sent back in full."""
    name = "x" * 100_000
    image = base64_of(IMAGE)
    for path, fields in (
        ("/v1/caption", {"image": image, name: 1}),
        ("/v1/caption", {"image": image, "options": {name: 1}}),
        ("/v1/caption", {"image": image, "ask": {name: 1}}),
        ("/v1/chat/completions", chat_with([{"type": "image_url", "image_url": {"url": "x"}}]) | {name: 1}),
        (f"/v1/caption?{name[:1000]}={{", {"image": image}),
    ):
        code, _, message = error_of(ask(service, "POST", path, json=fields))
        assert code == 400 and 20 < len(message) < 1000 and not message.endswith("xx")


def test_content_transfer_encodings_of_parts_are_read(service: EngineService) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n'
    body = part + b"Content-Transfer-Encoding: base64\r\n\r\n" + base64_of(IMAGE).encode() + b"\r\n--b--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert ask(service, "POST", "/v1/caption", content=body, headers=headers).status_code == 200


def test_a_body_beyond_the_limit_is_never_read_whole(service: EngineService) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 100 << 20:
            sent += 64 * 1024
            yield bytes(64 * 1024)

    headers = {"content-type": "multipart/form-data; boundary=b"}
    code, kind, _ = error_of(ask(service, "POST", "/v1/caption", content=endless(), headers=headers))
    assert (code, kind) == (413, "too_large")
    assert sent < 2 << 20


def test_an_image_beyond_the_limit_is_413(service: EngineService) -> None:
    big = {"image": ("x.jpg", bytes(service.image_policy.max_bytes + 1))}
    assert error_of(ask(service, "POST", "/v1/caption", files=big))[:2] == (413, "too_large")


def test_an_internal_error_reveals_nothing(service: EngineService, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("a secret of the service")

    monkeypatch.setattr(service, "run", fail)
    code, kind, message = error_of(post_json(service, json.dumps({"image": base64_of(IMAGE)}).encode()))
    assert (code, kind) == (500, "internal")
    assert "secret" not in message


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/caption", "POST, OPTIONS"),
        ("/v1/models", "GET, HEAD, OPTIONS"),
        ("/", "GET, HEAD, POST, OPTIONS"),
        ("/readyz", "GET, HEAD, OPTIONS"),
    ],
)
def test_options_says_which_methods_a_path_has(service: EngineService, path: str, methods: str) -> None:
    response = ask(service, "OPTIONS", path)
    assert (response.status_code, response.content) == (204, b"")
    assert response.headers["allow"] == methods
