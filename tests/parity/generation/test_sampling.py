"""Sampling: the distribution equals the reference's, and each request has its own seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from blip2_actor import Engine, GenerationOptions, Request
from blip2_actor.generation.logits_processors import SequenceSoFar, process_logits
from blip2_actor.generation.sampling import draw_without_replacement, sample, warp
from blip2_actor.testing import random_images
from tests.engines import cpu_config


@pytest.fixture(scope="module")
def engine(checkpoint_folder: Callable[..., Path]) -> Iterator[Engine]:
    config = cpu_config(checkpoint_folder())
    with Engine(config) as started:
        yield started


_WARPS = [
    GenerationOptions(do_sample=True, temperature=0.7),
    GenerationOptions(do_sample=True, top_k=5),
    GenerationOptions(do_sample=True, top_p=0.6),
    GenerationOptions(do_sample=True, temperature=1.7, top_k=20, top_p=0.8),
    GenerationOptions(do_sample=True, min_p=0.2),
    GenerationOptions(do_sample=True, typical_p=0.3),
    GenerationOptions(do_sample=True, top_k=30, min_p=0.05, typical_p=0.8),
    GenerationOptions(do_sample=True, repetition_penalty=0.7, top_k=1000),
    GenerationOptions(do_sample=True, no_repeat_ngram_size=1, top_p=0.01),
    GenerationOptions(
        do_sample=True, repetition_penalty=1.4, no_repeat_ngram_size=2, min_new_tokens=9, top_k=9
    ),
]
MIXED = [options.resolve() for options in _WARPS]


def reference_processors(
    options: GenerationOptions, prompt_length: int, end_ids: list[int], kept: int = 1
) -> LogitsProcessorList:
    reference = LogitsProcessorList()
    if options.repetition_penalty != 1.0:
        reference.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.no_repeat_ngram_size:
        reference.append(NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size))
    if options.min_new_tokens:
        reference.append(MinNewTokensLengthLogitsProcessor(prompt_length, options.min_new_tokens, end_ids))
    reference.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        reference.append(TopKLogitsWarper(options.top_k, min_tokens_to_keep=kept))
    if options.top_p < 1:
        reference.append(TopPLogitsWarper(options.top_p, min_tokens_to_keep=kept))
    if options.min_p > 0:
        reference.append(MinPLogitsWarper(options.min_p, min_tokens_to_keep=kept))
    if options.typical_p < 1:
        reference.append(TypicalLogitsWarper(options.typical_p, min_tokens_to_keep=kept))
    return reference


def test_beams_keep_as_many_tokens_as_in_the_reference() -> None:
    """With fewer, a beam whose best tokens all end it would have no continuation."""
    strict = GenerationOptions(do_sample=True, top_k=1).resolve()
    loose = replace(strict, top_k=0)
    options = [strict, replace(loose, top_p=0.01), replace(loose, min_p=1.0), replace(loose, typical_p=0.01)]
    logits = torch.randn(len(options), 50, generator=torch.Generator().manual_seed(4))
    ids = torch.zeros(1, 0, dtype=torch.long)
    expected = [
        reference_processors(o, 0, [], kept=3)(ids, x[None])[0] for o, x in zip(options, logits, strict=True)
    ]
    warped = warp(logits, options, min_kept=3)
    torch.testing.assert_close(warped, torch.stack(expected), rtol=0, atol=0)
    assert (warped > -torch.inf).sum(dim=1).min() >= 3


def test_drawing_without_replacement_follows_the_probabilities() -> None:
    """Over evenly spread numbers, each ordered pair occurs as often as in two successive draws."""
    p = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0], dtype=torch.float64)
    count = 80
    numbers = [[(i + 0.5) / count, (j + 0.5) / count] for i in range(count) for j in range(count)]
    pairs = draw_without_replacement(p.log().float().expand(count**2, -1), numbers)
    found = torch.zeros(5, 5, dtype=torch.float64).index_put_(
        tuple(pairs.T), torch.tensor(1 / count**2, dtype=torch.float64), accumulate=True
    )
    expected = p[:, None] * p / (1 - p[:, None]) * (1 - torch.eye(5))
    assert (found - expected).abs().max() < 2 / count
    few = draw_without_replacement(p.log().float()[None], [[0.3] * 5])
    assert sorted(few[0].tolist()) == [0, 1, 2, 3, 4]
    assert few[0, 4] == 4


def test_logits_processors_equal_the_reference_in_a_mixed_batch() -> None:
    """The order matters: penalties and bans, then temperature, top_k, top_p. A row that is processed with
    the options or tokens of another row has other scores."""
    generator = torch.Generator().manual_seed(1)
    end_ids = [7, 8]
    for num_repeats in range(10):
        logits = torch.randn(len(MIXED), 50, generator=generator) * 3
        sequences, expected = [], []
        for row, options in enumerate(MIXED):
            prefix_ids, token_ids = [3, 4, 5], [3, 4, 9 + row, 3][: row % 5] + [row] * num_repeats
            sequences.append(SequenceSoFar(options, prefix_ids, token_ids))
            reference = reference_processors(options, len(prefix_ids), end_ids)
            input_ids = torch.tensor([prefix_ids + token_ids])
            expected.append(reference(input_ids, logits[row : row + 1].clone())[0])
        scores = logits.clone()
        process_logits(scores, sequences, end_ids)
        torch.testing.assert_close(warp(scores, MIXED), torch.stack(expected), rtol=0, atol=0)


@pytest.mark.parametrize("options", MIXED[:4], ids=str)
def test_sampling_follows_the_references_probabilities(options: GenerationOptions) -> None:
    """With N evenly spread numbers, a token is selected N times its probability; a removed one, never."""
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(2)) * 2
    expected = reference_processors(options, 0, [])(torch.zeros(1, 0, dtype=torch.long), logits)[0].softmax(
        -1
    )
    count = 4000
    scores = logits.expand(count, -1)
    token_ids = sample(scores, [options] * count, [i / count for i in range(count)])
    counts = token_ids.bincount(minlength=50)
    assert (counts - count * expected).abs().max() <= 1
    assert counts[expected == 0].sum() == 0


def test_extreme_random_numbers_select_possible_tokens() -> None:
    """0 and the largest number below 1 are at the ends of the cumulative sum, next to banned tokens."""
    scores = torch.zeros(2, 300)
    scores[:, :3] = scores[:, -3:] = float("-inf")
    scores[:, 100] = 1
    plain = GenerationOptions(do_sample=True).resolve()
    assert sample(scores, [plain, plain], [0.0, 1 - 2**-53]).tolist() == [3, 296]


def test_rows_without_valid_probabilities_take_the_largest_score_and_change_no_other_row() -> None:
    """Sampling from NaN gives an index beyond the vocabulary, which makes a GPU fail the whole batch."""
    plain = GenerationOptions(do_sample=True, top_k=4, top_p=0.9).resolve()
    scores = torch.randn(4, 20, generator=torch.Generator().manual_seed(3))
    alone = sample(scores[3:], [plain], [0.4])
    scores[0], scores[1], scores[2, 5] = torch.nan, float("-inf"), float("inf")
    token_ids = sample(scores, [plain] * 4, [0.7, 0.5, 0.5, 0.4])
    assert token_ids[:3].tolist() == [0, 0, 5]
    assert token_ids[3] == alone[0]


def test_samples_follow_the_models_probabilities(engine: Engine) -> None:
    """The first tokens of 2,000 seeds match the first logits; a shared random generator would skew them."""
    image = engine.image(random_images(1)[0].numpy())
    count = 2000
    options = [GenerationOptions(do_sample=True, max_new_tokens=1, seed=s, top_k=4) for s in range(count)]
    results = engine.generate([Request(image=image, options=o) for o in options])
    counts = Counter(r.token_ids[0] for r in results)
    expected = {r.token_ids[0]: torch.tensor(r.logprob).exp().item() for r in results}
    total = sum(expected.values())
    assert len(counts) == 4
    for token_id, probability in expected.items():
        share = probability / total
        deviation = (share * (1 - share) / count) ** 0.5
        assert abs(counts[token_id] / count - share) < 4 * deviation


def test_a_seed_gives_the_same_text_alone_and_in_a_batch(engine: Engine) -> None:
    options = GenerationOptions(do_sample=True, temperature=1.5, seed=5, max_new_tokens=12)
    request = Request(image=random_images(1)[0].numpy(), options=options)
    alone = engine.generate([request])[0].token_ids
    others = [
        Request(image=i.numpy(), options=GenerationOptions(do_sample=True, seed=s))
        for s, i in enumerate(random_images(9))
    ]
    together = engine.generate([*others, request, *others])
    assert together[len(others)].token_ids == alone
    assert len({r.token_ids for r in together}) > 5


def test_several_samples_of_one_request_are_different_and_reproducible(engine: Engine) -> None:
    options = GenerationOptions(do_sample=True, num_return_sequences=4, seed=2, max_new_tokens=8)
    first, second = engine.generate([Request(image=random_images(1)[0].numpy(), options=options)] * 2)
    assert len({c.token_ids for c in first.completions}) == 4
    assert first.completions == second.completions


def test_texts_of_all_kinds_are_the_same_alone_and_together(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are selected for many rows at once, in pieces. A row that is processed with the options, tokens
    or random numbers of another row has another text."""
    monkeypatch.setattr("blip2_actor.generation.step.MAX_PROCESSED_AT_ONCE", 3)
    kinds = [
        *MIXED,
        GenerationOptions(),
        GenerationOptions(min_new_tokens=12, max_new_tokens=12),
        GenerationOptions(repetition_penalty=1.8),
        GenerationOptions(no_repeat_ngram_size=2),
        GenerationOptions(num_beams=3, repetition_penalty=1.5),
        GenerationOptions(num_beams=3, min_new_tokens=5),
        GenerationOptions(num_beams=3),
        GenerationOptions(num_beams=2, no_repeat_ngram_size=2),
        GenerationOptions(do_sample=True, num_return_sequences=3, seed=2),
        GenerationOptions(do_sample=True, num_beams=3, seed=4, temperature=2.0),
        GenerationOptions(do_sample=True, num_beams=3, seed=5, top_p=0.9, num_return_sequences=2),
        GenerationOptions(num_beams=3, renormalize_logits=True, bad_words_ids=((40,), (50, 60))),
        GenerationOptions(suppress_tokens=tuple(range(100, 200))),
    ]
    image = engine.image(random_images(1)[0].numpy())
    requests = [
        Request(image=image, prompt=prompt, options=replace(options, max_new_tokens=12))
        for options in kinds
        for prompt in ("a", "what is it?")
    ]
    alone = [engine.generate([request])[0] for request in requests]
    together = engine.generate(requests[::-1])[::-1]
    for one, other in zip(alone, together, strict=True):
        assert one.ok
        assert [c.token_ids for c in other.completions] == [c.token_ids for c in one.completions]
        assert other.logprob == pytest.approx(one.logprob, abs=1e-4)
