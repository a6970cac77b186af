"""The engine's token ids in a mixed batch against transformers' `generate`, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Blip2ForConditionalGeneration, LogitsProcessor, LogitsProcessorList

from blip2_actor import Engine, EngineConfig, GenerationOptions, Request, Status
from blip2_actor.testing import EOS_TOKEN_ID, IMAGE_TOKEN_ID, NUM_QUERIES, random_images, tiny_tokenizer

PROMPTS = [None, "a", "Question: what is it? Answer:", "été ☃", "", "this is a photo of"]


@pytest.fixture(scope="module")
def engine(checkpoint_folder: Callable[..., Path]) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    @cache
    def start(language: str = "opt", max_slots: int = 64, encode_batch: int = 4, **options: Any) -> Engine:
        config = EngineConfig(
            model=str(checkpoint_folder(language, **options)),
            dtype="float32",
            device="cpu",
            max_slots=max_slots,
            encode_batch=encode_batch,
        )
        engines.append(Engine(config))
        return engines[-1]

    yield start
    for started in engines:
        started.close()


def reference_ids(
    model: Blip2ForConditionalGeneration,
    language: str,
    request: Request,
    **options: Any,
) -> list[list[int]]:
    """Return the reference's new tokens for a request alone, one list per returned sequence."""
    prompt, image = request.prompt, torch.from_numpy(request.image)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    pixel_values = (image[None].permute(0, 3, 1, 2).float() / 255 - mean) / std
    text = (
        tiny_tokenizer(language)(prompt).input_ids if prompt else [2 if language == "opt" else EOS_TOKEN_ID]
    )
    input_ids = torch.tensor([[IMAGE_TOKEN_ID] * NUM_QUERIES + text])
    output = model.generate(
        pixel_values,
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        pad_token_id=1,
        **options,
    )
    start = input_ids.shape[1] if language == "opt" else 1
    rows = output[:, start:].tolist()
    return [row[: row.index(EOS_TOKEN_ID) + 1] if EOS_TOKEN_ID in row else row for row in rows]


def make_requests(count: int, prompts: Sequence[str | None] = PROMPTS) -> list[Request]:
    return [
        Request(image=image.numpy(), prompt=prompts[i % len(prompts)])
        for i, image in enumerate(random_images(count))
    ]


@pytest.mark.parametrize(
    ("language", "options"),
    [
        ("opt", {}),
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {"tie_word_embeddings": False}),
        ("t5", {}),
        ("t5", {"feed_forward_proj": "relu", "tie_word_embeddings": True}),
    ],
)
def test_greedy_search_equals_the_reference_in_a_mixed_batch(engine, reference, language, options) -> None:
    """Wrong padding or positions, or another row's keys, would change the tokens of a row."""
    requests = make_requests(12)
    results = engine(language, **options).generate(requests, GenerationOptions(max_new_tokens=20))
    for request, result in zip(requests, results, strict=True):
        (expected,) = reference_ids(
            reference(language, **options), language, request, max_new_tokens=20, do_sample=False
        )
        assert list(result.token_ids) == expected


@pytest.mark.parametrize("language", ["opt", "t5"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 3, "length_penalty": 2.0},
        {"num_beams": 5, "length_penalty": -1.0, "num_return_sequences": 3},
        {"num_beams": 3, "early_stopping": True},
        {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.5},
        {"num_beams": 5, "min_new_tokens": 6, "repetition_penalty": 1.5},
        {"num_beams": 3, "no_repeat_ngram_size": 2},
        {"min_new_tokens": 8},
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": list(range(5, 150))},
        {"num_beams": 3, "suppress_tokens": list(range(5, 150)), "renormalize_logits": True},
        {"num_beams": 3, "repetition_penalty": 2.5, "renormalize_logits": True, "length_penalty": 0.2},
    ],
    ids=str,
)
def test_search_options_equal_the_reference(engine, reference, language, options) -> None:
    """A beam whose keys are not reordered, or another length penalty, would give other tokens."""
    requests = make_requests(6)
    results = engine(language).generate(requests, GenerationOptions(max_new_tokens=12, **options))
    for request, result in zip(requests, results, strict=True):
        expected = reference_ids(
            reference(language), language, request, max_new_tokens=12, do_sample=False, **options
        )
        assert [list(c.token_ids) for c in result.completions] == expected


@pytest.mark.parametrize("language", ["opt", "t5"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_bad_words_equal_the_reference(engine, reference, language, num_beams) -> None:
    """Each image's own text gives the bad words: one token, pairs, and an end token, which stays allowed."""
    requests = make_requests(4)
    free = engine(language).generate(requests, GenerationOptions(max_new_tokens=12, num_beams=num_beams))
    options: dict[str, Any] = {"max_new_tokens": 12, "num_beams": num_beams}
    bad = [
        [[t[0]], [EOS_TOKEN_ID], *map(list, pairwise(t[1:]))] for t in (result.token_ids for result in free)
    ]
    results = engine(language).generate(
        [
            replace(request, options=GenerationOptions(**options, bad_words_ids=tuple(map(tuple, words))))
            for request, words in zip(requests, bad, strict=True)
        ]
    )
    for request, words, before, result in zip(requests, bad, free, results, strict=True):
        (expected,) = reference_ids(
            reference(language), language, request, bad_words_ids=words, do_sample=False, **options
        )
        assert list(result.token_ids) == expected != list(before.token_ids)


@pytest.mark.parametrize("language", ["opt", "t5"])
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(
    "stop", ["\n", " ", "".join(map(chr, range(33, 127)))], ids=["line", "space", "most"]
)
def test_stop_texts_equal_the_reference(engine, reference, language, num_beams, stop) -> None:
    """White space ends a text wherever it occurs. A beam that has ended never continues, even if most end."""
    stop, tokenizer = tuple(stop), tiny_tokenizer(language)
    wanted = tokenizer(" \nab", add_special_tokens=False).input_ids if len(stop) == 1 else range(5, 264)
    options = {
        "max_new_tokens": 12,
        "num_beams": num_beams,
        "num_return_sequences": num_beams,
        "suppress_tokens": [token_id for token_id in range(264) if token_id not in wanted],
    }
    requests = make_requests(6, prompts=[None])  # the reference also finds stop texts that begin in a prompt
    results = engine(language).generate(requests, GenerationOptions(**options, stop=stop))
    for request, result in zip(requests, results, strict=True):
        more = {"do_sample": False, "stop_strings": list(stop), "tokenizer": tokenizer}
        rows = reference_ids(reference(language), language, request, **options, **more)
        padding = 1
        assert [list(c.token_ids) for c in result.completions] == [
            [token_id for token_id in row if token_id != padding] for row in rows
        ]
        for completion in result.completions:
            text = tokenizer.decode(completion.token_ids)
            cut = min((text.index(s) for s in stop if s in text), default=None)
            assert completion.text == text[:cut].strip()
            assert completion.finish_reason == ("length" if cut is None else "stop")
        if num_beams == 1:
            streamed = engine(language).stream(request, stop=stop, **options)
            assert "".join(streamed) == result.text


class PreferRareIds(LogitsProcessor):
    """Subtract from each token its count in text and prompt, and 1 from even ids at even lengths."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.zeros_like(scores).scatter_add_(
            1, input_ids, torch.ones_like(input_ids, dtype=scores.dtype)
        )
        is_even = torch.arange(scores.shape[1]) % 2 == 0
        return scores - counts - is_even * float(input_ids.shape[1] % 2 == 0)


@pytest.mark.parametrize("language", ["opt", "t5"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_logits_processor_of_a_request_equals_the_reference(engine, reference, language, num_beams) -> None:
    """It sees the same ids as the reference's processors, after the options' own, for its request alone."""
    options = {"max_new_tokens": 12, "num_beams": num_beams, "repetition_penalty": 1.2}
    plain = make_requests(4)
    own = [replace(request, logits_processor=LogitsProcessorList([PreferRareIds()])) for request in plain]
    results = engine(language).generate([*own, *plain], GenerationOptions(**options))
    alone = engine(language).generate(plain, GenerationOptions(**options))
    assert [r.token_ids for r in results[4:]] == [r.token_ids for r in alone]
    for request, before, result in zip(plain, alone, results[:4], strict=True):
        (expected,) = reference_ids(
            reference(language),
            language,
            request,
            logits_processor=LogitsProcessorList([PreferRareIds()]),
            do_sample=False,
            **options,
        )
        assert list(result.token_ids) == expected != list(before.token_ids)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_logits_processor_that_raises_fails_its_own_request(engine, num_beams) -> None:
    def broken(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] > NUM_QUERIES + 4:
            raise KeyError("no such token")
        return scores

    good, other = make_requests(2, prompts=["a"])
    options = GenerationOptions(max_new_tokens=8, num_beams=num_beams, min_new_tokens=8)
    bad = replace(good, logits_processor=broken)
    wrong_shape = replace(good, logits_processor=lambda _, scores: scores[:, :1])
    no_scores = replace(good, logits_processor=lambda _, scores: None)  # type: ignore[arg-type, return-value]
    failed, misshapen, missing, served = engine().generate([bad, wrong_shape, no_scores, other], options)
    assert {failed.status, misshapen.status, missing.status} == {Status.FAILED} and served.ok
    assert failed.error == "logits_processor must not raise, got KeyError('no such token')"
    assert misshapen.error.startswith("logits_processor must return scores of shape")
    assert misshapen.error.endswith(f"got [{num_beams}, 1]") and missing.error.endswith("got NoneType")
    assert served.token_ids == engine().generate([other], options)[0].token_ids


def test_token_ids_beyond_the_vocabulary_are_refused(engine) -> None:
    (request,) = make_requests(1)
    for name, options in (
        ("suppress_tokens", GenerationOptions(suppress_tokens=(10**6,))),
        ("bad_words_ids", GenerationOptions(bad_words_ids=((5, 10**6),))),
    ):
        (result,) = engine().generate([request], options)
        assert result.status is Status.REFUSED
        assert f"{name} must be token ids below" in result.error


@pytest.mark.parametrize("language", ["opt", "t5"])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.5},
        {"top_k": 20, "top_p": 0.9, "renormalize_logits": True},
        {"min_p": 0.3, "typical_p": 0.9, "length_penalty": -1.0, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_beam_sampling_equals_the_reference_apart_from_chance(
    engine, reference, language, options, monkeypatch
) -> None:
    """Both draw continuations from scores. If both took the most likely ones, the texts would be equal."""
    options = {"max_new_tokens": 10, "num_beams": 3, "do_sample": True} | options
    monkeypatch.setattr(torch, "multinomial", lambda p, num_samples: p.topk(num_samples).indices)
    monkeypatch.setattr(
        "blip2_actor.generation.step.draw_without_replacement",
        lambda totals, uniforms: totals.softmax(-1).topk(len(uniforms[0])).indices,
    )
    requests = make_requests(4)
    results = engine(language).generate(requests, GenerationOptions(**options))
    for request, result in zip(requests, results, strict=True):
        given = {"top_k": 0} | options  # the reference's default is 50
        expected = reference_ids(reference(language), language, request, **given)
        assert [list(c.token_ids) for c in result.completions] == expected


def test_min_new_tokens_in_beam_search_equals_the_reference(engine, reference) -> None:
    """With this end token, texts end within three tokens unless min_new_tokens bans it.

    Searches with and without the ban run in the same batch.
    """
    end = 154
    checkpoint = {"eos_token_id": end, "seed": 3}
    options = [
        GenerationOptions(max_new_tokens=12, num_beams=3, length_penalty=-1.0, min_new_tokens=i % 3 * 4)
        for i in range(9)
    ]
    requests = [
        Request(image=request.image, options=o) for request, o in zip(make_requests(9), options, strict=True)
    ]
    results = engine("opt", **checkpoint).generate(requests)
    for request, own_options, result in zip(requests, options, results, strict=True):
        (expected,) = reference_ids(
            reference("opt", **checkpoint),
            "opt",
            request,
            max_new_tokens=12,
            do_sample=False,
            num_beams=3,
            length_penalty=-1.0,
            min_new_tokens=own_options.min_new_tokens,
        )
        if end in expected:
            expected = expected[: expected.index(end) + 1]
        assert list(result.token_ids) == expected
    assert min(len(result.token_ids) for result in results) < 4
