"""`POST /v1/batch`: decoded images and texts in one form, results as lines, all at low priority."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from blip2_actor import GenerationOptions, Request
from blip2_actor.testing import FakeEngineConfig, fake_caption, fake_features, fake_score
from deploy.guard.cost import Cost
from deploy.http.errors import unavailable
from deploy.routes import batch
from tests.unit.deploy.routes.engine_service import SIDE_PX, EngineService, ask, error_of

IMAGES = np.random.default_rng(0).integers(0, 255, (3, SIDE_PX, SIDE_PX, 3), np.uint8)
REFUSED = IMAGES[2]


@pytest.fixture(scope="module")
def service() -> EngineService:
    return EngineService(FakeEngineConfig(model="demo", refuses_on=(fake_caption(REFUSED),)))


def npy(images: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, images)
    return file.getvalue()


def send(service: EngineService, pixels: bytes, texts: list[dict], **fields: Any) -> httpx.Response:
    form = {name: json.dumps(value) for name, value in ({"texts": texts} | fields).items()}
    return ask(service, "POST", "/v1/batch", files={"pixels": pixels}, data=form)


def lines_of(response: httpx.Response) -> list[dict]:
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines() if line]


def test_each_text_gets_the_result_of_the_engine(service: EngineService) -> None:
    texts: list[dict] = [
        {"image": 1},
        {"image": 0, "prompt": "a photo of"},
        {"image": 1, "prompt": "été"},
        {"image": 2},
    ]
    options = asdict(GenerationOptions(num_beams=2, num_return_sequences=2, max_new_tokens=9).resolve())
    lines = sorted(lines_of(send(service, npy(IMAGES), texts, options=options)), key=lambda x: x["index"])
    first, second, third, refused = lines
    caption = fake_caption(IMAGES[1], None)
    assert [one["text"] for one in first["completions"]] == [caption, f"{caption} 1"]
    assert second["completions"][0]["text"] == fake_caption(IMAGES[0], "a photo of")
    assert third["completions"][0]["text"] == fake_caption(IMAGES[1], "été")
    assert third["completions"][0] | {"text": ""} == {
        "text": "",
        "token_ids": [1, 2, 3],
        "logprob": -1.5,
        "finish_reason": "stop",
        "token_logprobs": [-0.5] * 3,
    }
    assert (first["status"], first["error"], first["num_prompt_tokens"]) == ("ok", None, 1)
    assert (refused["status"], refused["completions"]) == ("refused", [])
    assert service.costs[-1] == Cost(slots=8, steps=9)


def test_scores_and_features_are_those_of_the_engine(service: EngineService, monkeypatch) -> None:
    """Positions count texts, scores and features; no call of the engine has more than a few of them."""
    scored = [{"image": 1, "text": "a dog", "prompt": "a photo of"}, {"image": 2, "text": "x" * 2000}]
    scored += [{"image": n % 2, "text": f"text {n}"} for n in range(20)]
    engine = service.captioner._actor.engine
    features, sizes = engine.features, []

    def note(images: Any, **options: Any) -> Any:
        sizes.append(len(images))
        assert all(image.low_priority for image in images)
        return features(images, **options)

    monkeypatch.setattr(engine, "features", note)
    wanted = [2, 0, *[1] * 15]
    answer = send(service, npy(IMAGES), [{"image": 0}], scores=scored, features=wanted)
    lines = sorted(lines_of(answer), key=lambda line: line["index"])
    assert [line["index"] for line in lines] == list(range(1 + len(scored) + len(wanted)))
    assert lines[0]["completions"][0]["text"] == fake_caption(IMAGES[0], None)
    assert lines[1] == {
        "index": 1,
        "status": "ok",
        "error": None,
        "logprob": fake_score(IMAGES[1], "a dog", "a photo of"),
        "num_tokens": 1,
    }
    assert (lines[2]["status"], lines[2]["logprob"]) == ("refused", None) and lines[2]["error"]
    assert lines[22]["logprob"] == fake_score(IMAGES[1], "text 19", None)
    for line, index in zip(lines[23:], wanted, strict=True):
        expected = fake_features(IMAGES[index])
        assert expected.qformer_features is not None and expected.pooler_output is not None
        assert base64.b64decode(line["qformer_features"]) == npy(expected.qformer_features)
        assert base64.b64decode(line["pooler_output"]) == npy(expected.pooler_output)
    assert sizes == [8, 8, 1]
    assert service.costs[-1] == Cost(slots=1 + len(scored) + len(wanted), steps=7)


def test_every_request_to_the_engine_has_low_priority(service: EngineService, monkeypatch) -> None:
    asked: list[Request] = []
    submit = service.captioner._actor.submit

    def note(request: Request, on_text: Any = None) -> Any:
        asked.append(request)
        return submit(request, on_text)

    monkeypatch.setattr(service.captioner._actor, "submit", note)
    lines_of(send(service, npy(IMAGES), [{"image": n} for n in (0, 1, 0)]))
    assert [request.low_priority for request in asked] == [True] * 3
    assert asked[0].image is asked[2].image, "an image is encoded once for all its texts"


@pytest.mark.parametrize(
    ("pixels", "texts", "said"),
    [
        (b"no array", [{}], "pixels must be a file of NumPy's format .npy"),
        (npy(IMAGES[:, :8]), [{}], f"pixels must be uint8[N, {SIDE_PX}, {SIDE_PX}, 3], got uint8[3, 8, "),
        (npy(IMAGES.astype(np.float32)), [{}], "got float32[3, "),
        (npy(np.array([{}], dtype=object)), [{}], "pixels must be a file of NumPy's format .npy"),
        (npy(IMAGES[:0]), [{}], "pixels must be from 1 to 64 images, got 0"),
        (npy(IMAGES), [{"image": 3}], "texts: image must be below the number of images, 3"),
        (npy(IMAGES), [{"image": -1}], "texts.0.image must be greater than or equal to 0, got -1"),
        (npy(IMAGES), [], "texts, scores and features must be from 1 to 256 together, got 0"),
    ],
    ids=["no-npy", "size", "dtype", "pickle", "empty", "image", "negative", "no-texts"],
)
def test_what_is_wrong_is_named(service: EngineService, pixels: bytes, texts: list[dict], said: str) -> None:
    code, kind, message = error_of(send(service, pixels, texts))
    assert (code, kind) == (400, "bad_request") and said in message


def test_the_texts_of_a_batch_are_bounded_together(service: EngineService) -> None:
    """8 MB in one prompt used to keep the engine busy for 12 s. A job resends refused texts one by one."""
    for fields in ({"texts": [{"prompt": "x"}] * 2}, {"texts": [], "scores": [{"text": "x", "prompt": "x"}]}):
        long = json.loads(json.dumps(fields).replace('"x"', f'"{"x" * (batch.MAX_BATCH_CHARS // 2 + 1)}"'))
        assert "1048576 characters together" in error_of(send(service, npy(IMAGES), **long))[2]
        assert lines_of(send(service, npy(IMAGES), **fields))


def test_pixels_come_in_a_form(service: EngineService) -> None:
    """JSON used to be documented, but refused because of a field's type."""
    answer = ask(service, "POST", "/v1/batch", json={"pixels": "AAAA", "texts": [{}]})
    assert error_of(answer)[:2] == (415, "unsupported_media_type")
    content = service.api.openapi()["paths"]["/v1/batch"]["post"]["requestBody"]["content"]
    assert list(content) == ["multipart/form-data"]
    assert "prompt" in content["multipart/form-data"]["schema"]["properties"]["texts"]["description"]


def test_a_dtype_without_a_model_is_refused(service: EngineService) -> None:
    """It used to be ignored."""
    assert error_of(send(service, npy(IMAGES), [{}], dtype="float16"))[0] == 400


def test_a_job_for_another_model_is_refused(service: EngineService) -> None:
    model = {"digest": service.first.info.digest, "dtype": service.first.info.dtype, "quantize": None}
    assert lines_of(send(service, npy(IMAGES), [{}], **model))
    for name in model:
        code, kind, message = error_of(send(service, npy(IMAGES), [{}], **(model | {name: "int8"})))
        assert (code, kind, message) == (
            409,
            "wrong_model",
            f"the model of the service has another {name}",
        )


def test_while_nothing_is_finished_empty_lines_come_and_the_end_of_the_service_is_noticed(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(batch, "PULSE_S", 0.02)
    gate = tmp_path / "closed"
    gate.touch()
    service = EngineService(FakeEngineConfig(model="demo", gate=str(gate)))
    num_checks = 0

    def check() -> None:
        nonlocal num_checks
        num_checks += 1
        if num_checks == 3:
            raise unavailable("the service is ending")

    async def run() -> list[bytes]:
        sent: list[bytes] = []

        async def emit(piece: bytes) -> None:
            sent.append(piece)

        model = service.first
        texts = [batch.TextOfBatch(image=0, text=batch.TextToGenerate(prompt=None, options=model.options))]
        monkeypatch.setattr(service, "admit_batch", lambda cost: _Checked(check))
        with pytest.raises(Exception, match="the service is ending"):
            await batch._serve(
                service, model, IMAGES, batch.BatchWork(texts=tuple(texts)), Cost(slots=1, steps=1), emit
            )
        return sent

    assert asyncio.run(run()) == [b"\n"] * 3
    gate.unlink()


class _Checked:
    def __init__(self, check: Any) -> None:
        self.check = check

    async def __aenter__(self) -> Any:
        return self.check

    async def __aexit__(self, *_: object) -> None: ...
