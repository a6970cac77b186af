"""Sampling: the distribution is the reference's, the seed is the request's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from blip2_actor import Engine, EngineConfig, GenerationOptions, Request
from blip2_actor.processors import process, warp
from tests.parity.tiny import images


@pytest.fixture(scope="module")
def engine(checkpoint_folder: Callable[..., Path]) -> Iterator[Engine]:
    config = EngineConfig(model=str(checkpoint_folder()), dtype="float32", device="cpu", num_threads=1)
    with Engine(config) as started:
        yield started


@pytest.mark.parametrize(
    "options",
    [
        GenerationOptions(do_sample=True, temperature=0.7),
        GenerationOptions(do_sample=True, top_k=5),
        GenerationOptions(do_sample=True, top_p=0.6),
        GenerationOptions(do_sample=True, temperature=1.7, top_k=20, top_p=0.8),
        GenerationOptions(
            do_sample=True, repetition_penalty=1.4, no_repeat_ngram_size=2, min_new_tokens=9, top_k=9
        ),
    ],
    ids=str,
)
def test_scores_equal_the_references_processors(options: GenerationOptions) -> None:
    """Order matters: penalties and bans, then temperature, top-k, top-p."""
    generator = torch.Generator().manual_seed(1)
    context, num_new, ends = [3, 4, 5, 3, 4, 9, 3], 4, [7, 8]
    reference = LogitsProcessorList()
    if options.repetition_penalty != 1.0:
        reference.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.no_repeat_ngram_size:
        reference.append(NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size))
    if options.min_new_tokens:
        reference.append(
            MinNewTokensLengthLogitsProcessor(len(context) - num_new, options.min_new_tokens, ends)
        )
    reference.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        reference.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        reference.append(TopPLogitsWarper(options.top_p))
    for _ in range(20):
        logits = torch.randn(50, generator=generator) * 3
        expected = reference(torch.tensor([context]), logits[None].clone())[0]
        found = logits.clone()
        process(found, options, context, num_new, ends)
        torch.testing.assert_close(warp(found, options), expected)


def test_samples_follow_the_models_probabilities(engine: Engine) -> None:
    """First tokens of 2,000 seeds against the first logits: a generator reused wrongly skews this."""
    image = engine.image(images(1)[0].numpy())
    count = 2000
    options = [GenerationOptions(do_sample=True, max_new_tokens=1, seed=s, top_k=4) for s in range(count)]
    results = engine.generate([Request(image=image, options=o) for o in options])
    drawn = Counter(r.token_ids[0] for r in results)
    expected = {r.token_ids[0]: torch.tensor(r.logprob).exp().item() for r in results}
    total = sum(expected.values())
    assert len(drawn) == 4
    for token_id, probability in expected.items():
        share = probability / total
        deviation = (share * (1 - share) / count) ** 0.5
        assert abs(drawn[token_id] / count - share) < 4 * deviation


def test_a_seed_gives_the_same_text_whatever_runs_beside_it(engine: Engine) -> None:
    options = GenerationOptions(do_sample=True, temperature=1.5, seed=5, max_new_tokens=12)
    request = Request(image=images(1)[0].numpy(), options=options)
    alone = engine.generate([request])[0].token_ids
    others = [
        Request(image=i.numpy(), options=GenerationOptions(do_sample=True, seed=s))
        for s, i in enumerate(images(9))
    ]
    crowded = engine.generate([*others, request, *others])
    assert crowded[len(others)].token_ids == alone
    assert len({r.token_ids for r in crowded}) > 5


def test_several_samples_of_one_request_are_different_and_reproducible(engine: Engine) -> None:
    options = GenerationOptions(do_sample=True, num_return_sequences=4, seed=2, max_new_tokens=8)
    first, second = engine.generate([Request(image=images(1)[0].numpy(), options=options)] * 2)
    assert len({c.token_ids for c in first.completions}) == 4
    assert first.completions == second.completions
