"""Beam search of one request, with the same tokens as transformers' `_beam_search`.

Each step sees the 2 * num_beams best continuations of all beams (more if there are several end tokens), so
that num_beams unfinished ones remain even if the best ones all end. With do_sample, continuations are drawn
at random instead, without replacement. A text that ends among the first
num_beams is a candidate for the result. Its score is its log-probability with the length penalty.

Source: transformers 5.23, generation/utils.py, `GenerationMixin._beam_search` and its helpers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from random import Random

from blip2_actor.generation.logits_processors import SequenceSoFar, has_processors
from blip2_actor.generation.search import Vocabulary, has_ended, to_completion
from blip2_actor.options import GenerationOptions
from blip2_actor.request import Completion, LogitsProcessor

IMPOSSIBLE = -1.0e9
"""The reference's score of a beam that must not be selected."""


@dataclass(frozen=True)
class Hypothesis:
    """A text so far."""

    token_ids: tuple[int, ...]
    score: float
    """Sum of the tokens' log-probabilities after the logits processors; with the length penalty once the
    text has ended."""
    token_logprobs: tuple[float, ...]
    """Log-probability of each token, before any logits processor."""


@dataclass(frozen=True)
class Candidate:
    """A continuation: beam `parent` with `token_id` appended."""

    parent: int
    token_id: int
    score: float
    """Score of the whole text, as in `Hypothesis`."""
    logprob: float
    """Log-probability of this token alone, before any logits processor."""


class BeamSearch:
    """Beam search over num_beams slots with the same prefix."""

    def __init__(
        self,
        options: GenerationOptions,
        prefix_ids: Sequence[int],
        vocabulary: Vocabulary,
        processor: LogitsProcessor | None = None,
    ) -> None:
        """
        Args:
            prefix_ids: ids that the reference's logits processors see before the first new token.
            processor: the request's own logits processor.
        """
        self.options = options
        self.prefix_ids = list(prefix_ids)
        self.vocabulary = vocabulary
        self.num_slots = options.num_beams
        self.min_kept = max(2, 1 + len(vocabulary.end_ids))
        """Tokens of a beam that sampling keeps at least, so that it can go on if the best ones end it."""
        self.num_candidates = self.min_kept * options.num_beams
        self.has_processors = has_processors(options)
        self.processor = processor
        self.random = Random(options.seed) if options.do_sample else None
        """Gives `num_candidates` numbers per token; None takes the best continuations."""
        self.error: str | None = None
        """Why there is no text: `processor` has failed, or the processors leave no token."""
        self.beams = [Hypothesis((), 0.0 if i == 0 else IMPOSSIBLE, ()) for i in range(self.num_slots)]
        self.finished: list[Hypothesis] = []
        self.is_improvable = True
        """True while a running beam could still beat the worst finished text."""
        self.done = False

    def tokens(self) -> list[int]:
        """Return the newest token of each slot."""
        return [beam.token_ids[-1] for beam in self.beams]

    @property
    def end_is_banned(self) -> bool:
        """True until the texts have min_new_tokens tokens."""
        return len(self.beams[0].token_ids) < self.options.min_new_tokens

    def sequences(self) -> list[SequenceSoFar]:
        return [SequenceSoFar(self.options, self.prefix_ids, beam.token_ids) for beam in self.beams]

    def fail(self, error: str) -> None:
        """End without a text."""
        self.error, self.done = error, True

    def advance(self, candidates: Sequence[Candidate]) -> list[int]:
        """Advance all beams by one token.

        Args:
            candidates: the `num_candidates` best continuations, best first, or those drawn, as drawn.

        Returns:
            For each new beam, the index of the beam whose slot it continues.
        """
        length = len(self.beams[0].token_ids) + 1
        extended = [self._extend(c) for c in candidates]
        ended = [has_ended(h.token_ids, self.options, self.vocabulary) for h in extended]
        scores = [h.score + (IMPOSSIBLE if e else 0.0) for h, e in zip(extended, ended, strict=True)]
        kept = sorted(range(len(extended)), key=scores.__getitem__, reverse=True)[: self.num_slots]

        if self.is_improvable and not self._stops_early():
            best = zip(extended[: self.num_slots], ended[: self.num_slots], strict=True)
            # A score of -inf is that of a text with a banned token.
            self._finish([h for h, has_ended in best if has_ended and h.score != -inf], length)
        # If too few go on, as with many stop texts, beams that have ended stay, with scores that never win.
        self.beams = [replace(extended[i], score=scores[i]) for i in kept]
        self.is_improvable = self.is_improvable and self._can_improve(length)
        self.done = self.done or not self.is_improvable or self._stops_early() or all(ended)
        return [candidates[i].parent for i in kept]

    def _finish(self, hypotheses: Sequence[Hypothesis], length: int) -> None:
        """Add texts that have ended, and keep the num_beams best of all that have."""
        for hypothesis in hypotheses:
            score = hypothesis.score / length**self.options.length_penalty
            self.finished.append(Hypothesis(hypothesis.token_ids, score, hypothesis.token_logprobs))
        self.finished = sorted(self.finished, key=lambda h: h.score, reverse=True)[: self.num_slots]

    def _stops_early(self) -> bool:
        return len(self.finished) == self.num_slots and self.options.early_stopping is True

    def _extend(self, candidate: Candidate) -> Hypothesis:
        parent = self.beams[candidate.parent]
        token_ids = (*parent.token_ids, candidate.token_id)
        return Hypothesis(token_ids, candidate.score, (*parent.token_logprobs, candidate.logprob))

    def _can_improve(self, length: int) -> bool:
        """Estimate, as the reference does, if the best beam can still beat the worst finished text."""
        options = self.options
        if len(self.finished) < self.num_slots:
            return True
        prefers_long = options.early_stopping == "never" and options.length_penalty > 0
        best_length = options.max_new_tokens if prefers_long else length
        return self.beams[0].score / best_length**options.length_penalty > self.finished[-1].score

    def completions(self) -> list[Completion]:
        best = self.finished[: self.options.num_return_sequences]
        return [to_completion(h.token_ids, h.token_logprobs, self.options, self.vocabulary) for h in best]
