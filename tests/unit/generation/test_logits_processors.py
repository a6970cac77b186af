"""What options and a caller's own processor do to the scores of one step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blip2_actor import GenerationOptions
from blip2_actor.generation import step
from blip2_actor.generation.beam_search import BeamSearch
from blip2_actor.generation.logits_processors import SequenceSoFar, process_logits

NUM_TOKENS = 12


class Vocabulary:
    end_ids = frozenset([2])

    def decode(self, token_ids: Sequence[int]) -> str:
        return ""


def test_a_bad_word_may_begin_in_the_prompt() -> None:
    """The reference's processors see prompt and new tokens as one sequence."""
    options = GenerationOptions(bad_words_ids=((5, 7), (6, 8), (4, 5, 9))).resolve()
    scores = torch.zeros(2, NUM_TOKENS)
    process_logits(scores, [SequenceSoFar(options, [4, 5], []), SequenceSoFar(options, [4], [5])], [2])
    assert [row.isinf().nonzero().flatten().tolist() for row in scores] == [[7, 9], [7, 9]]


def test_beam_sampling_keeps_a_token_that_goes_on_next_to_each_that_ends() -> None:
    """With the end token alone, no beam could go on; the reference keeps one token more."""
    for limits in ({"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}, {"typical_p": 0.01}):
        options = GenerationOptions(num_beams=2, do_sample=True, **limits).resolve()
        search = BeamSearch(options, [0], Vocabulary())
        scores = torch.linspace(-3, 0, NUM_TOKENS).expand(1, 2, -1).log_softmax(-1)
        assert step._beam_scores(scores, [search]).isfinite().sum(-1).tolist() == [[2, 2]], limits


def test_the_scores_that_a_processor_keeps_do_not_change() -> None:
    """People record them; the step goes on to compute in its own memory."""
    kept: list[Tensor] = []
    options = GenerationOptions(num_beams=2, max_new_tokens=5).resolve()

    def record(token_ids: Tensor, scores: Tensor) -> Tensor:
        kept.append(scores)
        return scores

    search = BeamSearch(options, [0], Vocabulary(), record)
    logits = torch.randn(2, NUM_TOKENS, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        step.advance(logits, [(search, [0, 1])])
    for scores in kept:
        torch.testing.assert_close(scores, logits.log_softmax(-1), rtol=0, atol=0)
