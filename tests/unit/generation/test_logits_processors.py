"""The effect of options and of a caller's own processor on the scores of one step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from blip2_actor import GenerationOptions
from blip2_actor.generation import step
from blip2_actor.generation.beam_search import BeamSearch, Candidate
from blip2_actor.generation.logits_processors import SequenceSoFar, process_logits
from blip2_actor.generation.search import TextSearch

NUM_TOKENS = 12


class Vocabulary:
    def __init__(self, *end_ids: int) -> None:
        self.end_ids = frozenset(end_ids)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        return ""


def test_a_bad_word_may_begin_in_the_prompt() -> None:
    """The reference's processors see prompt and new tokens as one sequence."""
    options = GenerationOptions(bad_words_ids=((5, 7), (6, 8), (4, 5, 9))).resolve()
    scores = torch.zeros(2, NUM_TOKENS)
    process_logits(scores, [SequenceSoFar(options, [4, 5], []), SequenceSoFar(options, [4], [5])], [2])
    assert [row.isinf().nonzero().flatten().tolist() for row in scores] == [[7, 9], [7, 9]]


def test_beam_sampling_keeps_a_token_that_goes_on_next_to_each_that_ends() -> None:
    """With the end token alone, no beam could continue; the reference keeps one token more, at least two."""
    for limits in ({"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}, {"typical_p": 0.01}):
        options = GenerationOptions(num_beams=2, do_sample=True, **limits).resolve()
        for end_ids, num_kept in (((2, 3), 3), ((2,), 2), ((), 2)):
            search = BeamSearch(options, [0], Vocabulary(*end_ids))
            scores = torch.linspace(-3, 0, NUM_TOKENS).expand(1, 2, -1).log_softmax(-1)
            kept = step._beam_scores(scores, [search]).isfinite().sum(-1)
            assert kept.tolist() == [[num_kept, num_kept]], limits


def test_a_text_with_a_banned_token_is_not_returned() -> None:
    """If nearly all tokens are banned, there may be fewer texts than beams."""
    options = GenerationOptions(num_beams=2, num_return_sequences=2, max_new_tokens=1).resolve()
    search = BeamSearch(options, [0], Vocabulary(2))
    banned = Candidate(parent=1, token_id=6, score=-math.inf, logprob=-1.0)
    search.advance([Candidate(parent=0, token_id=5, score=-2.0, logprob=-2.0), *[banned] * 3])
    assert search.done
    assert [completion.token_ids for completion in search.completions()] == [(5,)]


def test_the_scores_that_a_processor_keeps_do_not_change() -> None:
    """Callers record them, while the step continues to compute in its own memory."""
    kept: list[Tensor] = []
    options = GenerationOptions(num_beams=2, max_new_tokens=5).resolve()

    def record(token_ids: Tensor, scores: Tensor) -> Tensor:
        kept.append(scores)
        return scores

    search = BeamSearch(options, [0], Vocabulary(2), record)
    logits = torch.randn(2, NUM_TOKENS, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        step.advance(logits, [(search, [0, 1])])
    for scores in kept:
        torch.testing.assert_close(scores, logits.log_softmax(-1), rtol=0, atol=0)


def test_a_text_that_begins_again_asks_a_processor_once_for_each_token() -> None:
    """A processor that plans a text would fall behind, and one that fails later would revoke tokens."""
    options = GenerationOptions(max_new_tokens=6).resolve()
    plan = iter(range(3, 9))

    def follow(token_ids: Tensor, scores: Tensor) -> Tensor:
        only = torch.full_like(scores, -math.inf)
        only[:, next(plan)] = 0.0
        return only

    text, again = (TextSearch(options, [0], Vocabulary(2), processor=follow) for _ in range(2))
    logits = torch.zeros(1, NUM_TOKENS)
    for _ in range(4):
        step.advance(logits, [(text, [0])])
    again.repeat(text)
    while not again.done:
        step.advance(logits, [(again, [0])])
    assert (again.token_ids, again.error) == ([3, 4, 5, 6, 7, 8], None)
