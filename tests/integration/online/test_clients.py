"""Existing clients, unchanged, against the running endpoint."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from huggingface_hub import InferenceClient

from blip2_actor import EngineConfig, Request, Result
from tests.integration.online.endpoint import NUM_CALLERS, caption_of, engine_stats, png, post, wait_for

pytestmark = pytest.mark.timeout(480)

PROMPT = "été ☃"


@pytest.fixture(scope="module")
def expected(real_engine: EngineConfig) -> dict[bytes, Result]:
    """The engine's own results for some pictures."""
    images = [png(seed) for seed in range(8)]
    with real_engine.build() as engine:
        results = engine.generate([Request(image=image, prompt=PROMPT) for image in images])
    assert len({result.text for result in results}) > 1
    return dict(zip(images, results, strict=True))


def plain(url: str, image: bytes) -> tuple[str, list[int] | None]:
    answer = post(f"{url}/real", image, prompt=PROMPT).json()
    return answer["caption"], answer["token_ids"]


def streamed(url: str, image: bytes) -> tuple[str, list[int] | None]:
    form = {"prompt": PROMPT, "stream": "true"}
    with httpx.stream(
        "POST", f"{url}/real/v1/caption", files={"image": image}, data=form, timeout=60
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        pieces = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
    assert "".join(piece["text"] for piece in pieces[:-1]) == pieces[-1]["caption"]
    return pieces[-1]["caption"], pieces[-1]["token_ids"]


def many(url: str, image: bytes) -> tuple[str, list[int] | None]:
    form = {"prompt": PROMPT}
    lines = httpx.post(f"{url}/real/v1/captions", files={"images": image}, data=form, timeout=60).text
    answer = json.loads(lines)
    return answer["caption"], answer["token_ids"]


def chat(url: str, image: bytes, **fields: Any) -> Any:
    client = openai.OpenAI(base_url=f"{url}/real/v1", api_key="any", max_retries=0)
    uri = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    content: Any = [{"type": "text", "text": PROMPT}, {"type": "image_url", "image_url": {"url": uri}}]
    [model] = client.models.list()
    return client.chat.completions.create(
        model=model.id, messages=[{"role": "user", "content": content}], temperature=0, **fields
    )


def completed(url: str, image: bytes) -> tuple[str, list[int] | None]:
    return chat(url, image).choices[0].message.content, None


def completed_in_chunks(url: str, image: bytes) -> tuple[str, list[int] | None]:
    chunks = chat(url, image, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks), None


@pytest.mark.parametrize("num_callers", [1, 32])
def test_every_interface_gives_the_texts_and_tokens_of_the_engine(
    url: str, expected: dict[bytes, Result], num_callers: int
) -> None:
    interfaces: list[Callable[[str, bytes], tuple[str, list[int] | None]]] = [
        plain,
        streamed,
        many,
        completed,
        completed_in_chunks,
    ]
    calls = [(ask, image) for image in expected for ask in interfaces]
    calls = calls if num_callers > 1 else calls[: len(interfaces)]
    with ThreadPoolExecutor(num_callers) as callers:
        answers = list(callers.map(lambda call: call[0](url, call[1]), calls))
    for (ask, image), (text, token_ids) in zip(calls, answers, strict=True):
        assert text == expected[image].text, ask.__name__
        assert token_ids in (None, list(expected[image].token_ids)), ask.__name__


def test_the_client_of_hugging_face(url: str, tmp_path: Path) -> None:
    image = png(3)
    (tmp_path / "picture.png").write_bytes(image)
    client = InferenceClient(url)
    for given in (image, str(tmp_path / "picture.png")):
        assert client.image_to_text(given).generated_text == caption_of(image)


def test_curl_sends_the_image_itself(url: str, tmp_path: Path) -> None:
    """Unless a header is given, curl declares the body as a form."""
    (tmp_path / "picture.png").write_bytes(png(4))
    address = f"{url}/v1/caption?prompt=a+photo+of"
    command = ["curl", "-sS", "--data-binary", f"@{tmp_path}/picture.png", address]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    assert answer["caption"] == caption_of(png(4), "a photo of")


def test_refusals_are_exceptions_of_the_client(url: str) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        chat(url, b"no image at all")
    assert caught.value.code == "undecodable"


def test_clients_that_leave_a_stream_free_their_slots(url: str, closed_gate: Path) -> None:
    before = engine_stats()

    def leave(number: int) -> bool:
        """Ask for a stream and disconnect; return False if refused. Equal requests would share a slot."""
        image, timeout = png(6_000 + number), httpx.Timeout(10, read=0.3)
        try:
            httpx.post(f"{url}/v1/caption", files={"image": image}, data={"stream": "true"}, timeout=timeout)
        except httpx.ReadTimeout:
            return True
        return False

    # On a busy machine the other clients may all disconnect before the engine has their requests.
    with closing(HTTPConnection(urlsplit(url).netloc)) as patient:
        form = httpx.Request("POST", url, files={"image": png(5_998)}, data={"stream": "true"})
        patient.request("POST", "/v1/caption", form.read(), dict(form.headers))
        wait_for(lambda: engine_stats().num_requests > before.num_requests)
    with ThreadPoolExecutor(NUM_CALLERS) as callers:
        for _ in range(2):  # the second round fits only once the first has released its places
            wait_for(lambda: all(callers.map(leave, range(NUM_CALLERS))))
    closed_gate.unlink()
    wait_for(lambda: post(url, png(5_999)).status_code == 200)
    after = engine_stats()
    num_cancelled = (after.num_requests - before.num_requests) - (after.num_finished - before.num_finished)
    assert num_cancelled > 0
