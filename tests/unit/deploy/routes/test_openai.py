"""OpenAI's routes with the `openai` client itself, and the features that BLIP-2 refuses."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, replace
from typing import Any, TypeVar, cast

import httpx
import numpy as np
import openai
import pytest

from blip2_actor import Calibration, GenerationOptions, Request
from blip2_actor.testing import fake_features, save_tiny_checkpoint
from deploy.openai.chat_request import MIN_TEMPERATURE, ChatBody
from tests.engines import cpu_config
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
PROMPT = "Question: what is it? Answer:"
MESSAGES: Any = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": PROMPT},
            {"type": "image_url", "image_url": {"url": data_uri(IMAGE)}},
        ],
    }
]
T = TypeVar("T")


@pytest.fixture(scope="module")
def service() -> EngineService:
    return EngineService()


def with_client(service: EngineService, call: Callable[[openai.AsyncOpenAI], Awaitable[T]]) -> T:
    async def run() -> T:
        transport = httpx.ASGITransport(service.api, raise_app_exceptions=False)
        async with (
            httpx.AsyncClient(transport=transport) as http,
            openai.AsyncOpenAI(
                base_url="http://test/v1", api_key="any", http_client=cast(Any, http), max_retries=0
            ) as client,
        ):
            return await call(client)

    return asyncio.run(run())


def chat(service: EngineService, **fields: Any) -> httpx.Response:
    return post(service, "/v1/chat/completions", **{"model": "demo", "messages": MESSAGES} | fields)


def test_a_completion_is_the_caption_of_the_text(service: EngineService) -> None:
    made = with_client(
        service, lambda client: client.chat.completions.create(model="demo", messages=MESSAGES)
    )
    assert made.choices[0].message.content == caption_of(IMAGE, PROMPT)
    assert (made.choices[0].finish_reason, made.model) == ("stop", "demo")
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (2 + 1, 3)
    assert made.usage.total_tokens == 6
    [message] = MESSAGES
    alone = [message | {"content": message["content"][1:]}]
    assert chat(service, messages=alone).json()["choices"][0]["message"]["content"] == caption_of(IMAGE)


def test_the_system_fingerprint_follows_the_options_of_the_service(
    service: EngineService,
) -> None:
    """A request that leaves the options out then gets other texts."""
    others = EngineService(options=GenerationOptions(max_new_tokens=8))
    asked = [(service, {}), (service, {"max_tokens": 3}), (others, {})]
    first, same, other = (chat(one, **fields).json()["system_fingerprint"] for one, fields in asked)
    assert first == same != other


def test_several_samples_are_choices(service: EngineService) -> None:
    made = with_client(
        service,
        lambda client: client.chat.completions.create(
            model="demo", messages=MESSAGES, n=3, temperature=0.7, seed=5, user="somebody"
        ),
    )
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    assert service.costs[-1].slots == 3


def test_a_stream_joins_to_the_completion(service: EngineService) -> None:
    async def stream(client: openai.AsyncOpenAI) -> tuple[str, Any]:
        text, usage = "", None
        async for chunk in await client.chat.completions.create(
            model="demo", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        ):
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            usage = chunk.usage or usage
        return text, usage

    text, usage = with_client(service, stream)
    assert text == caption_of(IMAGE, PROMPT)
    assert usage.total_tokens == 6
    assert service.num_in_flight == 0


def test_the_chunks_are_those_of_openai(service: EngineService) -> None:
    events = events_of(chat(service, stream=True, n=2, temperature=1))
    assert events.pop() == ("message", "[DONE]")
    for index in (0, 1):
        own = [chunk["choices"][0] for _, chunk in events if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert own[-1]["finish_reason"] == "stop" and own[-1]["delta"] == {}
        assert "".join(choice["delta"].get("content", "") for choice in own) == caption_of(IMAGE, PROMPT)
    assert len({chunk["id"] for _, chunk in events}) == 1
    beams = EngineService(options=GenerationOptions(num_beams=2))
    whole = [choice for _, c in events_of(chat(beams, stream=True, n=2))[:-1] for choice in c["choices"]]
    texts = ["".join(c["delta"].get("content", "") for c in whole if c["index"] == i) for i in (0, 1)]
    assert texts == [caption_of(IMAGE, PROMPT), f"{caption_of(IMAGE, PROMPT)} 1"]


def test_a_choice_says_how_sure_it_is_as_a_caption_does(service: EngineService) -> None:
    """The client keeps fields that OpenAI does not define."""

    def calibrate(asked: EngineService, calibration: Calibration) -> EngineService:
        asked._models.first = replace(asked.first, calibration=calibration)
        return asked

    first = service.first
    calibration = Calibration(
        coefficients={"log_odds": 0.0, "num_tokens": 1.0},
        intercept=0.0,
        curve=((0.0, 0.0), (10.0, 1.0)),
        model=first.info.digest,
        prompt=PROMPT,
        options=asdict(first.options),
    )
    calibrated = calibrate(EngineService(), calibration)

    async def complete(client: openai.AsyncOpenAI) -> list[Any]:
        made = await client.chat.completions.create(model="demo", messages=MESSAGES)
        pieces = await client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
        return [*made.choices, *[choice async for piece in pieces for choice in piece.choices]]

    for asked, expected in ((calibrated, pytest.approx(0.3)), (service, None)):
        whole, *pieces, last = with_client(asked, complete)
        assert whole.confidence == last.confidence == expected
        assert not any(hasattr(piece, "confidence") for piece in pieces)
    other_options = chat(calibrated, max_tokens=3).json()["choices"][0]
    assert other_options["confidence"] is None
    fit = replace(calibration, options=asdict(replace(first.options, num_beams=2, num_return_sequences=2)))
    beams = calibrate(EngineService(options=replace(first.options, num_beams=2)), fit)
    best, second = chat(beams, n=2).json()["choices"]
    assert best["confidence"] == pytest.approx(0.3) and second["confidence"] is None


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineService]:
    """A model whose tokens are single bytes, which sometimes end inside a character."""
    model = save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    config = cpu_config(model)
    made = EngineService(config, GenerationOptions(max_new_tokens=12))
    yield made
    made.captioner._actor.close()


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1, "n": 3, "seed": 5}])
def test_log_probabilities_are_those_of_the_tokens_of_the_text(
    bytewise: EngineService, sampling: dict[str, Any]
) -> None:
    asked = {"model": bytewise.first.name, "messages": MESSAGES, "logprobs": True} | sampling
    made = with_client(bytewise, lambda client: client.chat.completions.create(**asked))
    results = bytewise.captioner._actor.engine.generate([requested(sampling)])[0].completions
    for choice, result in zip(made.choices, results, strict=True):
        assert choice.message.content == result.text
        assert choice.logprobs is not None and choice.logprobs.content is not None
        tokens = choice.logprobs.content
        assert "".join(token.token for token in tokens) == result.text
        assert b"".join(bytes(token.bytes or ()) for token in tokens) == result.text.encode()
        assert [token.logprob for token in tokens] == list(result.token_logprobs[: len(tokens)])
        assert len(tokens) >= len(result.token_ids) - 1  # all but the end token

    chunks = events_of(post(bytewise, "/v1/chat/completions", **asked, stream=True))[:-1]
    streamed = [choice for _, chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    streamed.sort(key=lambda choice: choice["index"])
    for choice, chunk in zip(made.choices, streamed, strict=True):
        assert choice.logprobs is not None and choice.logprobs.content is not None
        whole, piecewise = choice.logprobs.content, chunk["logprobs"]["content"]
        assert [token.token for token in whole] == [token["token"] for token in piecewise]
        expected = pytest.approx([token["logprob"] for token in piecewise], rel=1e-5)
        assert [token.logprob for token in whole] == expected


def test_a_stream_of_sampled_beams_has_the_choices_of_the_completion(bytewise: EngineService) -> None:
    """A stream used to make a separate search for each choice, with another seed."""
    options = GenerationOptions(max_new_tokens=12, do_sample=True, num_beams=4, temperature=3.0)
    first = bytewise.first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bytewise._models, "first", replace(first, options=options))
        asked = {"model": first.name, "messages": MESSAGES, "n": 3, "seed": 5}
        made = post(bytewise, "/v1/chat/completions", **asked).json()["choices"]
        chunks = events_of(post(bytewise, "/v1/chat/completions", **asked, stream=True))[:-1]
    texts = ["", "", ""]
    for _, chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert [choice["message"]["content"] for choice in made] == texts


def requested(sampling: dict[str, Any]) -> Request:
    options = GenerationOptions(max_new_tokens=12)
    if sampling["temperature"]:
        options = replace(options, do_sample=True, seed=5, num_return_sequences=3)
    return Request(image=pixels_of(IMAGE), prompt=PROMPT, options=options)


def test_tokens_after_a_stop_text_have_no_place_in_the_log_probabilities(bytewise: EngineService) -> None:
    asked = {
        "model": bytewise.first.name,
        "messages": MESSAGES,
        "temperature": 1,
        "seed": 5,
        "logprobs": True,
    }
    text = post(bytewise, "/v1/chat/completions", **asked).json()["choices"][0]["message"]["content"]
    stop = next(letter for letter in text[1:] if letter.isascii() and not letter.isspace())
    choice = post(bytewise, "/v1/chat/completions", **asked, stop=stop).json()["choices"][0]
    tokens = [token["token"] for token in choice["logprobs"]["content"]]
    assert "".join(tokens) == choice["message"]["content"] == text[: text.index(stop)].rstrip() != text


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, GenerationOptions()),
        ({"temperature": 0, "seed": 5, "top_p": 0.5}, GenerationOptions()),
        ({"max_tokens": 9, "stop": "."}, GenerationOptions(max_new_tokens=9, stop=(".",))),
        (
            {"max_completion_tokens": 9, "stop": ["a", "b"]},
            GenerationOptions(max_new_tokens=9, stop=("a", "b")),
        ),
        (
            {"temperature": 0.5, "top_p": 0.9, "seed": -1, "n": 2},
            GenerationOptions(
                do_sample=True, temperature=0.5, top_p=0.9, seed=(1 << 62) - 1, num_return_sequences=2
            ),
        ),
        ({"temperature": 0.5, "seed": 3}, GenerationOptions(do_sample=True, temperature=0.5, seed=3)),
        ({"top_p": 0.5, "seed": 3}, GenerationOptions(do_sample=True, top_p=0.5, seed=3)),
        ({"top_k": -1}, GenerationOptions()),
        ({"top_k": 5, "seed": 3}, GenerationOptions(do_sample=True, top_k=5, seed=3)),
        (
            {"temperature": 1e-9, "top_k": -1, "seed": 3},
            GenerationOptions(do_sample=True, temperature=MIN_TEMPERATURE, seed=3),
        ),
        (
            {"min_tokens": 2, "repetition_penalty": 1.5},
            GenerationOptions(min_new_tokens=2, repetition_penalty=1.5),
        ),
    ],
)
def test_fields_become_options(service: EngineService, fields: dict, expected: GenerationOptions) -> None:
    body = ChatBody(model="demo", messages=MESSAGES, **fields)
    assert body.generation_options(GenerationOptions().resolve()) == expected.resolve()


def test_samples_without_a_seed_differ_and_greedy_leaves_beams(service: EngineService) -> None:
    body = ChatBody(model="demo", messages=MESSAGES, temperature=1)
    defaults = GenerationOptions().resolve()
    assert body.generation_options(defaults).seed != body.generation_options(defaults).seed
    greedy = ChatBody(model="demo", messages=MESSAGES, temperature=0)
    beams = GenerationOptions(num_beams=4, length_penalty=2.0).resolve()
    assert greedy.generation_options(beams) == defaults


LONG_TEXT = {"type": "text", "text": "x" * 8192}
"""Each part has a legal length. An engine used to split 8 MB of them for 9 s, while all others waited."""


@pytest.mark.parametrize(
    ("fields", "code", "named"),
    [
        ({"model": "gpt-4"}, 404, "demo"),
        ({"top_logprobs": 0}, 400, "without logprobs"),
        ({"logprobs": True, "top_logprobs": 2}, 400, "top_logprobs must be 0, got 2"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"logit_bias": {"50256": -100}}, 400, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"n": 2, "temperature": 0}, 400, "temperature"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "max_tokens"),
        ({"max_tokens": 100_000}, 400, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"messages": [{"role": "system", "content": "be kind"}, *MESSAGES]}, 400, "system"),
        ({"messages": [{"role": "user", "content": "no image"}]}, 400, "image"),
        ({"messages": [MESSAGES[0] | {"content": MESSAGES[0]["content"] * 2}]}, 400, "image"),
        ({"messages": []}, 400, "messages"),
        (
            {"messages": [MESSAGES[0] | {"content": [*MESSAGES[0]["content"], LONG_TEXT]}]},
            400,
            "at most 8192",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "'image_url', 'text'"),
    ],
)
def test_what_blip2_cannot_do_is_refused_by_name(
    service: EngineService, fields: dict, code: int, named: str
) -> None:
    response = chat(service, **fields)
    assert response.status_code == code, response.text
    assert named in error_of(response)[2]


@pytest.mark.parametrize(
    ("neutral", "other"),
    [
        ({"modalities": ["text"]}, {"modalities": ["text", "audio"]}),
        ({"tool_choice": "none"}, {"tool_choice": "required"}),
        ({"reasoning_effort": "none"}, {"reasoning_effort": "high"}),
        ({"parallel_tool_calls": True, "tools": []}, {"tools": [{"type": "function"}]}),
        ({"prompt_cache_retention": "24h"}, {"web_search_options": {"user_location": None}}),
    ],
)
def test_values_that_ask_for_nothing_are_accepted(
    service: EngineService, neutral: dict[str, Any], other: dict[str, Any]
) -> None:
    """Frameworks fill these fields in."""
    assert chat(service, **neutral).json()["choices"] == chat(service).json()["choices"]
    assert error_of(chat(service, **other))[0] == 400


def test_refusals_are_errors_of_the_client(service: EngineService) -> None:
    remote = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}]}
    ]

    async def ask_for_url(client: openai.AsyncOpenAI) -> openai.BadRequestError:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="demo", messages=remote, stream=True)  # type: ignore[arg-type]
        return caught.value

    error = with_client(service, ask_for_url)
    assert error.code == "url_refused" and "data URI" in error.message


def test_models_are_listed(service: EngineService) -> None:
    async def listed(client: openai.AsyncOpenAI) -> list[str]:
        assert (await client.models.retrieve("demo")).id == "demo"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("org/other")
        return [model.id async for model in client.models.list()]

    assert with_client(service, listed) == ["demo"]


def test_images_are_embedded(service: EngineService) -> None:
    images = [IMAGE, png(2)]
    made = with_client(
        service, lambda client: client.embeddings.create(model="demo", input=[data_uri(x) for x in images])
    )
    expected = []
    for image in images:
        features = fake_features(pixels_of(image)).qformer_features
        assert features is not None
        expected.append(features.mean(axis=0))
    assert np.array_equal(np.array([one.embedding for one in made.data], np.float32), expected)
    assert (made.data[1].index, made.usage.total_tokens) == (1, 4)
    messages = [{"role": "user", "content": MESSAGES[0]["content"][1:]}]
    as_vllm = post(service, "/v1/embeddings", model="demo", messages=messages, encoding_format="base64")
    packed = base64.b64decode(as_vllm.json()["data"][0]["embedding"])
    assert np.array_equal(np.frombuffer(packed, "<f4"), expected[0])
    for fields in ({"input": "a text"}, {"messages": MESSAGES}, {}):
        assert error_of(post(service, "/v1/embeddings", model="demo", **fields))[0] == 400


def test_the_task_of_hugging_face(service: EngineService) -> None:
    raw = ask(service, "POST", "/", content=IMAGE)
    assert raw.json() == [{"generated_text": caption_of(IMAGE)}]
    parameters = {"generate_kwargs": {"num_beams": 3, "top_k": None}, "max_new_tokens": 5}
    for name in ("inputs", "image"):
        assert ask(service, "POST", "/", files={name: ("photo.jpg", IMAGE)}).status_code == 200
    answer = post(service, "/", inputs=base64_of(IMAGE), parameters=parameters)
    assert answer.json() == [{"generated_text": caption_of(IMAGE)}]
    assert (service.costs[-1].slots, service.costs[-1].steps) == (3, 5)
    wrong = post(
        service, "/", inputs=base64_of(IMAGE), parameters={"generation_parameters": {"eta_cutoff": 1}}
    )
    assert error_of(wrong)[:2] == (400, "bad_request")


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"generate_kwargs": {}, "generation_parameters": {}}, "generate_kwargs must be left out"),
        (
            {"generate_kwargs": {"max_new_tokens": 3}, "max_new_tokens": 5},
            "max_new_tokens must be given once",
        ),
    ],
)
def test_what_is_given_twice_to_the_task_is_refused(
    service: EngineService, parameters: dict[str, Any], said: str
) -> None:
    """One of the two used to be ignored, or reported as an unknown field."""
    assert said in error_of(post(service, "/", inputs=base64_of(IMAGE), parameters=parameters))[2]
