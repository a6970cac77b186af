"""Greedy search and sampling: how one text grows, token by token.

A search owns the text of one or more slots (`num_slots`). The scheduler asks it which tokens to append to the
slots and whether it is done; token selection (`step.py`) gives it each next token. `BeamSearch`
(`beam_search.py`) is the other search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Protocol

from blip2_actor.generation.logits_processors import SequenceSoFar, has_processors
from blip2_actor.options import GenerationOptions
from blip2_actor.request import Completion, LogitsProcessor


class Vocabulary(Protocol):
    """What a search needs from the tokenizer."""

    end_ids: frozenset[int]

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of generated ids, with the white space around it: a stop text may be in it."""
        ...


class TextSearch:
    """Greedy search, or sampling with its own random numbers; one slot."""

    num_slots = 1

    def __init__(
        self,
        options: GenerationOptions,
        prefix_ids: Sequence[int],
        vocabulary: Vocabulary,
        seed: int | None = None,
        on_token: Callable[[Sequence[int]], None] | None = None,
        processor: LogitsProcessor | None = None,
    ) -> None:
        """
        Args:
            prefix_ids: ids that the reference's logits processors see before the first new token.
            seed: of this text's random numbers; None is greedy search.
            on_token: called with all new tokens, after each of them that is not taken again by `repeat`.
            processor: the request's own logits processor.
        """
        self.options = options
        self.prefix_ids = list(prefix_ids)
        self.vocabulary = vocabulary
        self.random = None if seed is None else Random(seed)
        """Gives one number per token; None in greedy search."""
        self.on_token = on_token
        self.processor = processor
        self.error: str | None = None
        """Why there is no text: `processor` has failed, or the processors leave no token."""
        self.token_ids: list[int] = []
        self.token_logprobs: list[float] = []
        self.done = False
        self.takes_argmax = self.random is None and processor is None and not has_processors(options)
        """True if the next token is the largest logit, apart from end tokens while `end_is_banned`."""
        self._known: list[tuple[int, float]] = []
        """Tokens to take again, each with its log-probability."""

    def repeat(self, before: TextSearch) -> None:
        """Take the tokens of an unfinished search instead of those that are selected, and go on after them.

        A caller who has seen the text must not get another one. In another batch the device may round a logit
        differently, and a caller's processor need not repeat itself.
        """
        num_taken = len(before.token_ids)
        self._known = [*zip(before.token_ids, before.token_logprobs, strict=True), *before._known[num_taken:]]

    @property
    def repeats(self) -> bool:
        """True if the next token is known, whatever is selected."""
        return self.known_token(len(self.token_ids)) is not None

    def known_token(self, position: int) -> int | None:
        """Return the token that the text takes again at a position; None if the token is new."""
        return self._known[position][0] if position < len(self._known) else None

    def tokens(self) -> list[int]:
        """Return the newest token of the slot."""
        return self.token_ids[-1:]

    @property
    def end_is_banned(self) -> bool:
        """True until the text has min_new_tokens tokens."""
        return len(self.token_ids) < self.options.min_new_tokens

    def sequences(self) -> list[SequenceSoFar]:
        return [SequenceSoFar(self.options, self.prefix_ids, self.token_ids)]

    def fail(self, error: str) -> None:
        """End without a text."""
        self.error, self.done = error, True

    def accept(self, token_id: int, logprob: float) -> bool:
        """Append a token, or the one that is known instead; return True if the text is complete."""
        is_new = not self.repeats
        if not is_new:
            token_id, logprob = self._known[len(self.token_ids)]
        self.token_ids.append(token_id)
        self.token_logprobs.append(logprob)
        self.done = has_ended(self.token_ids, self.options, self.vocabulary)
        if self.on_token is not None and is_new:
            self.on_token(self.token_ids)
        return self.done

    def completions(self) -> list[Completion]:
        return [to_completion(self.token_ids, self.token_logprobs, self.options, self.vocabulary)]


def has_ended(token_ids: Sequence[int], options: GenerationOptions, vocabulary: Vocabulary) -> bool:
    """Return True if a text ends with its last token."""
    if token_ids[-1] in vocabulary.end_ids or len(token_ids) >= options.max_new_tokens:
        return True
    return bool(options.stop) and cut_at_stop(vocabulary.detokenize(token_ids), options.stop) is not None


def to_completion(
    token_ids: Sequence[int],
    token_logprobs: Sequence[float],
    options: GenerationOptions,
    vocabulary: Vocabulary,
) -> Completion:
    """Return a text that has ended, as callers get it."""
    text = vocabulary.detokenize(token_ids)
    cut = cut_at_stop(text, options.stop)
    is_stopped = cut is not None or token_ids[-1] in vocabulary.end_ids
    return Completion(
        text=text.strip() if cut is None else cut,
        token_ids=tuple(token_ids),
        logprob=sum(token_logprobs),
        token_logprobs=tuple(token_logprobs),
        finish_reason="stop" if is_stopped else "length",
    )


def cut_at_stop(text: str, stop: Sequence[str]) -> str | None:
    """Return `text` up to the first stop text in it, or None if it contains none."""
    places = [place for place in (text.find(s) for s in stop) if place >= 0]
    return text[: min(places)].strip() if places else None
