"""Beam search of one request, token for token that of transformers' `_beam_search`.

Each step sees the 2 * num_beams best continuations of all beams (more where there are several end
tokens), so that num_beams unfinished ones remain even if the best all end. A text that ends among the
first num_beams is a candidate for the result, scored by its length-penalised log-probability.

Source: transformers 5.23, generation/utils.py, `GenerationMixin._beam_search` and its helpers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blip2_actor.generation.logits_processors import SequenceSoFar, penalizes
from blip2_actor.generation.search import Vocabulary, cut_at_stop
from blip2_actor.options import GenerationOptions
from blip2_actor.request import Completion

IMPOSSIBLE = -1.0e9
"""The reference's score of what must not be chosen."""


@dataclass(frozen=True)
class Hypothesis:
    """A text so far: `score` as the search sees it, `logprob` before any processor."""

    token_ids: tuple[int, ...]
    score: float
    logprob: float


@dataclass(frozen=True)
class Candidate:
    """One way to go on: append `token_id` to beam `parent`."""

    parent: int
    token_id: int
    score: float
    logprob: float
    """Of this token alone, before any processor."""


class BeamSearch:
    """num_beams slots that share a prefix."""

    def __init__(self, options: GenerationOptions, context: Sequence[int], vocabulary: Vocabulary) -> None:
        self.options = options
        self.context = list(context)
        self.vocabulary = vocabulary
        self.num_slots = options.num_beams
        self.num_candidates = max(2, 1 + len(vocabulary.end_ids)) * options.num_beams
        self.has_penalties = penalizes(options)
        self.beams = [Hypothesis((), 0.0 if i == 0 else IMPOSSIBLE, 0.0) for i in range(self.num_slots)]
        self.finished: list[Hypothesis] = []
        self.improvable = True
        self.done = False

    def tokens(self) -> list[int]:
        return [beam.token_ids[-1] for beam in self.beams]

    @property
    def must_go_on(self) -> bool:
        """True while the end token is not allowed yet."""
        return len(self.beams[0].token_ids) < self.options.min_new_tokens

    def drafts(self) -> list[SequenceSoFar]:
        return [SequenceSoFar(self.options, self.context, beam.token_ids) for beam in self.beams]

    def advance(self, candidates: Sequence[Candidate]) -> list[int]:
        """Take one step.

        Args:
            candidates: the `num_candidates` best continuations, best first.

        Returns:
            For each new beam, the beam whose slot it continues.
        """
        options, length = self.options, len(self.beams[0].token_ids) + 1
        grown = [self._grow(c) for c in candidates]
        ends = [self._ends(h, length) for h in grown]

        order = sorted(
            range(len(grown)), key=lambda i: grown[i].score + (IMPOSSIBLE if ends[i] else 0.0), reverse=True
        )
        kept = order[: self.num_slots]

        is_full = len(self.finished) == self.num_slots and options.early_stopping is True
        if self.improvable and not is_full:
            for hypothesis, has_ended in list(zip(grown, ends, strict=True))[: self.num_slots]:
                if has_ended:
                    penalised = hypothesis.score / length**options.length_penalty
                    self.finished.append(Hypothesis(hypothesis.token_ids, penalised, hypothesis.logprob))
            self.finished = sorted(self.finished, key=lambda h: h.score, reverse=True)[: self.num_slots]

        self.beams = [grown[i] for i in kept]
        self.improvable = self.improvable and self._can_improve(length)
        is_full = len(self.finished) == self.num_slots and options.early_stopping is True
        self.done = not self.improvable or is_full or all(ends)
        return [candidates[i].parent for i in kept]

    def _grow(self, candidate: Candidate) -> Hypothesis:
        parent = self.beams[candidate.parent]
        token_ids = (*parent.token_ids, candidate.token_id)
        return Hypothesis(token_ids, candidate.score, parent.logprob + candidate.logprob)

    def _ends(self, hypothesis: Hypothesis, length: int) -> bool:
        if hypothesis.token_ids[-1] in self.vocabulary.end_ids or length >= self.options.max_new_tokens:
            return True
        return bool(self.options.stop) and self._cut(hypothesis) is not None

    def _cut(self, hypothesis: Hypothesis) -> str | None:
        return cut_at_stop(self.vocabulary.decode(hypothesis.token_ids), self.options.stop)

    def _can_improve(self, length: int) -> bool:
        """The reference's estimate: could the best running beam still beat the worst finished text?"""
        options = self.options
        if len(self.finished) < self.num_slots:
            return True
        longest = options.early_stopping == "never" and options.length_penalty > 0
        best_length = options.max_new_tokens if longest else length
        return self.beams[0].score / best_length**options.length_penalty > self.finished[-1].score

    def completions(self) -> list[Completion]:
        found = []
        for hypothesis in self.finished[: self.options.num_return_sequences]:
            ended = hypothesis.token_ids[-1] in self.vocabulary.end_ids
            cut = self._cut(hypothesis) if self.options.stop else None
            found.append(
                Completion(
                    text=cut if cut is not None else self.vocabulary.decode(hypothesis.token_ids),
                    token_ids=hypothesis.token_ids,
                    logprob=hypothesis.logprob,
                    finish_reason="stop" if ended or cut is not None else "length",
                )
            )
        return found
