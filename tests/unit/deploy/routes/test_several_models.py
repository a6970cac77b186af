"""One endpoint with several models: requests choose by name, and looking at a model does not wake it."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from ray.exceptions import ActorDiedError

from blip2_actor import EngineConfig, GenerationOptions, ModelInfo
from blip2_actor.testing import FakeEngineConfig
from deploy.captioner import Captioner
from deploy.check import check_serve_config
from deploy.guard.admission import Admission
from deploy.reuse.shared_work import SharedWork
from deploy.settings import Settings
from tests.unit.deploy.routes.engine_service import (
    EngineService,
    ask,
    base64_of,
    caption_of,
    data_uri,
    error_of,
    png,
    post,
)

IMAGE = png(3)
CHAT = {
    "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_uri(IMAGE)}}]}]
}


class Other(Captioner):
    """The captioner of a further model as a gateway sees it; its description comes later or never."""

    def __init__(self, **engine: Any) -> None:
        super().__init__(FakeEngineConfig(model="folder", **engine), GenerationOptions())
        self.num_asked = 0
        self.failure: Exception | None = None

    async def info(self) -> ModelInfo:  # type: ignore[override]
        self.num_asked += 1
        if self.failure is not None:
            raise self.failure
        return self._actor.info


@pytest.fixture
def other() -> Other:
    return Other()


@pytest.fixture
def service(other: Other) -> EngineService:
    made = EngineService()
    made._models._others = {"other": other}  # type: ignore[dict-item]
    return made


def test_a_request_chooses_its_model_by_name(service: EngineService, other: Other) -> None:
    listed = ask(service, "GET", "/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["demo", "other"]
    assert ask(service, "GET", "/v1/models/other").json()["id"] == "other"
    assert other.num_asked == 0  # looking does not wake it
    answers = [
        post(service, "/v1/caption", image=base64_of(IMAGE), model="other"),
        ask(service, "POST", "/v1/caption", files={"image": IMAGE}, data={"model": "other"}),
        ask(service, "POST", "/v1/caption", content=IMAGE, params={"model": "other"}),
        post(service, "/v1/chat/completions", **CHAT, model="other"),
        post(service, "/v1/score", image=base64_of(IMAGE), texts=["a dog"], model="other"),
        post(service, "/v1/embed", image=base64_of(IMAGE), model="other"),
    ]
    assert [answer.json()["model"] for answer in answers] == ["other"] * 6
    texts_of_four = (other.stats().num_requests, service.captioner.stats().num_requests)
    assert texts_of_four == (4, 0)
    assert other.num_asked == 1
    first = ask(service, "POST", "/v1/caption", content=IMAGE).json()
    assert (first["model"], first["caption"]) == ("demo", caption_of(IMAGE))
    assert ask(service, "GET", "/v1/model", params={"model": "other"}).json()["model"] == "other"


def test_models_share_no_answers(service: EngineService, other: Other) -> None:
    service._shared_work = SharedWork(1 << 20)
    for _ in range(2):
        for name in ("demo", "other"):
            assert post(service, "/v1/caption", image=base64_of(IMAGE), model=name).json()["model"] == name
    assert service.captioner.stats().num_requests == other.stats().num_requests == 1


NEEDS_NO_RETRIEVAL: list[tuple[str, dict[str, Any]]] = [
    ("/v1/caption", {"image": base64_of(IMAGE)}),
    ("/v1/caption", {"image": base64_of(IMAGE), "stream": True}),
    ("/v1/captions", {"images": [base64_of(IMAGE)] * 3}),
    ("/v1/score", {"image": base64_of(IMAGE), "texts": ["a"]}),
    ("/v1/rerank", {"query": "a", "documents": [{"image": base64_of(IMAGE)}]}),
    ("/v1/embed", {"image": base64_of(IMAGE)}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | {"stream": True}),
    ("/v1/embeddings", {"input": data_uri(IMAGE)}),
    ("/", {"inputs": base64_of(IMAGE)}),
]
MATCH = ("/v1/match", {"image": base64_of(IMAGE), "texts": ["a"]})


@pytest.mark.parametrize(("path", "fields"), [*NEEDS_NO_RETRIEVAL, MATCH])
def test_an_unknown_model_is_404_in_the_shape_of_openai(
    service: EngineService, path: str, fields: dict[str, Any]
) -> None:
    answer = post(service, path, **fields, model="gpt-4")
    assert error_of(answer)[:2] == (404, "model_not_found")
    assert "demo or other" in answer.json()["error"]["message"]


def test_a_model_whose_engines_do_not_run_is_503_and_asked_again(
    service: EngineService, other: Other
) -> None:
    other.failure = ActorDiedError()
    for _ in range(2):
        answer = post(service, "/v1/caption", image=base64_of(IMAGE), model="other")
        assert (error_of(answer)[0], answer.headers["retry-after"]) == (503, "1")
    assert other.num_asked == 2
    other.failure = None
    assert post(service, "/v1/caption", image=base64_of(IMAGE), model="other").status_code == 200


@pytest.mark.parametrize(("path", "fields"), NEEDS_NO_RETRIEVAL)
def test_the_request_that_starts_a_model_is_admitted_once(
    service: EngineService, path: str, fields: dict[str, Any]
) -> None:
    service._admission = Admission(slots=8, max_in_flight=1, timeout_s=60)
    answer = post(service, path, **fields, model="other")
    assert answer.status_code == 200 and '"error":{' not in answer.text
    assert service._admission.stats()["num_in_flight"] == service._admission.stats()["slots_held"] == 0
    assert len(service.costs) == 1


def test_requests_for_a_starting_model_ask_it_once(service: EngineService, other: Other) -> None:
    may_answer = asyncio.Event()

    async def wait_and_answer() -> ModelInfo:
        other.num_asked += 1
        await may_answer.wait()
        return other._actor.info

    async def run() -> list[httpx.Response]:
        other.info = wait_and_answer  # type: ignore[method-assign]
        transport = httpx.ASGITransport(service.api)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            calls = [
                asyncio.create_task(client.post("/v1/caption", content=IMAGE, params={"model": "other"}))
                for _ in range(3)
            ]
            while not other.num_asked:
                await asyncio.sleep(0)
            calls[0].cancel()
            may_answer.set()
            return await asyncio.gather(*calls[1:])

    assert [answer.status_code for answer in asyncio.run(run())] == [200, 200]
    assert other.num_asked == 1


# Settings ---------------------------------------------------------------------------------------------------


def test_a_further_model_takes_the_engine_of_the_first_with_flags_of_its_own() -> None:
    first = EngineConfig(model="demo", revision="abc", device="cpu", dtype="float32", num_threads=2)
    given = ("tuned=some/folder --quantize int8", "'s3=s3://bucket/a b'".strip("'"))
    with pytest.raises(ValueError, match="other_models must be NAME=MODEL"):
        Settings(engine=first, other_models=given)
    engines = Settings(engine=first, other_models=(given[0], "plain=demo --revision x")).other_engines
    assert engines == {
        "tuned": EngineConfig(
            model="some/folder", device="cpu", dtype="float32", num_threads=2, quantize="int8"
        ),
        "plain": EngineConfig(model="demo", revision="x", device="cpu", dtype="float32", num_threads=2),
    }


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("demo=other",), "different names"),
        (("a=x", "a=y"), "different names"),
        (("a b=x",), "the name has at most"),
        (("a",), "the name has at most"),
        (("a=x --quantise int8",), "--quantize"),
        (("a=x --dtype float8",), "dtype"),
    ],
)
def test_wrong_further_models_are_refused(given: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Settings(engine=EngineConfig(model="demo"), other_models=given)


def test_a_serve_config_scales_each_model_by_its_deployment() -> None:
    def config(name: str) -> dict[str, Any]:
        scaled = {"name": name, "autoscaling_config": {"min_replicas": 0, "max_replicas": 1}}
        arguments = {"other_models": ["tuned=demo"], "allow_anonymous": True}
        application = {"name": "a", "import_path": "deploy.app:build", "args": arguments}
        return {"applications": [application | {"deployments": [scaled]}]}

    check_serve_config(config("Captioner_tuned"))
    with pytest.raises(ValueError, match="Gateway or Captioner or Captioner_tuned, got Captioner_other"):
        check_serve_config(config("Captioner_other"))
