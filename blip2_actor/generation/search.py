"""How one text grows: greedy search or sampling, a token at a time.

A search owns one or more slots (`num_slots`); the scheduler asks it what to append and when it is done.
`BeamSearch` (beam.py) is the other search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Protocol

from blip2_actor.generation.logits_processors import SequenceSoFar, penalizes
from blip2_actor.options import GenerationOptions
from blip2_actor.request import Completion, FinishReason


class Vocabulary(Protocol):
    """What a search must know of the tokenizer."""

    end_ids: frozenset[int]

    def decode(self, token_ids: Sequence[int]) -> str: ...


class TextSearch:
    """Greedy search, or sampling with a generator of its own; one slot."""

    num_slots = 1

    def __init__(
        self,
        options: GenerationOptions,
        context: Sequence[int],
        vocabulary: Vocabulary,
        seed: int | None = None,
        on_token: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        """
        Args:
            context: what the reference's logits processors see before the first new token.
            seed: of this text's random numbers; None is greedy search.
            on_token: called with all new tokens after each one.
        """
        self.options = options
        self.context = list(context)
        self.vocabulary = vocabulary
        self.random = None if seed is None else Random(seed)
        """Gives one number a token; None takes the best token."""
        self.on_token = on_token
        self.token_ids: list[int] = []
        self.logprob = 0.0
        self.done = False
        self.finish_reason: FinishReason = "length"
        self.stop_text: str | None = None
        self.takes_largest = self.random is None and not penalizes(options)
        """True where the next token is the largest logit, end tokens aside while `must_go_on`."""
        self._max_new_tokens = options.max_new_tokens
        self._end_ids = vocabulary.end_ids

    def tokens(self) -> list[int]:
        return self.token_ids[-1:]

    @property
    def must_go_on(self) -> bool:
        """True while the end token is not allowed yet."""
        return len(self.token_ids) < self.options.min_new_tokens

    @property
    def draft(self) -> SequenceSoFar:
        return SequenceSoFar(self.options, self.context, self.token_ids)

    def accept(self, token_id: int, logprob: float) -> bool:
        """Append a token; True when the text is complete."""
        self.token_ids.append(token_id)
        self.logprob += logprob
        if token_id in self._end_ids or (self.options.stop and self._stops()):
            self.done, self.finish_reason = True, "stop"
        elif len(self.token_ids) >= self._max_new_tokens:
            self.done = True
        if self.on_token is not None:
            self.on_token(self.token_ids)
        return self.done

    def _stops(self) -> bool:
        text = self.vocabulary.decode(self.token_ids)
        cut = cut_at_stop(text, self.options.stop)
        if cut is not None:
            self.stop_text = cut
        return cut is not None

    def completions(self) -> list[Completion]:
        text = self.stop_text if self.stop_text is not None else self.vocabulary.decode(self.token_ids)
        return [
            Completion(
                text=text,
                token_ids=tuple(self.token_ids),
                logprob=self.logprob,
                finish_reason=self.finish_reason,
            )
        ]


def cut_at_stop(text: str, stop: Sequence[str]) -> str | None:
    """`text` up to the first stop text in it, or None where there is none."""
    places = [place for place in (text.find(s) for s in stop) if place >= 0]
    return text[: min(places)].strip() if places else None
