"""Logits processors: penalties and bans before token selection, and the processor of a request's own.

Meaning and order are those of transformers' `LogitsProcessorList` (generation/logits_process.py), for all
texts of a step at once. The affected scores are listed on the host and sent to the device in one piece.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from blip2_actor.options import GenerationOptions
from blip2_actor.request import LogitsProcessor
from blip2_actor.transfer import to_device


class WrongScores(ValueError):
    """A request's own logits processor has returned something other than scores."""


class SequenceSoFar(NamedTuple):
    """A text that is being generated, as the logits processors see it."""

    options: GenerationOptions
    prefix_ids: Sequence[int]
    """Ids before the first new token: image tokens and prompt."""
    token_ids: Sequence[int]
    """New tokens."""


def has_processors(options: GenerationOptions) -> bool:
    """Return True if the options change scores, apart from min_new_tokens."""
    return bool(
        options.repetition_penalty != 1.0
        or options.no_repeat_ngram_size
        or options.suppress_tokens
        or options.bad_words_ids
    )


def process_logits(scores: Tensor, sequences: Sequence[SequenceSoFar], end_ids: Sequence[int]) -> None:
    """Apply the logits processors of each sequence, in place.

    Args:
        scores: float32[N, V], logits or log-probabilities.
        sequences: N texts.
        end_ids: the checkpoint's end tokens.
    """
    penalized, banned = _Entries(), _Entries()
    penalties: list[float] = []
    for row, (options, prefix_ids, token_ids) in enumerate(sequences):
        if options.repetition_penalty != 1.0:
            repeated = {*prefix_ids, *token_ids}
            penalized.add(row, repeated)
            penalties += [options.repetition_penalty] * len(repeated)
        if options.no_repeat_ngram_size > 0:
            banned.add(row, _ngram_endings([*prefix_ids, *token_ids], options.no_repeat_ngram_size))
        if options.bad_words_ids:
            banned.add(row, _bad_word_endings([*prefix_ids, *token_ids], options.bad_words_ids, end_ids))
        if len(token_ids) < options.min_new_tokens:
            banned.add(row, end_ids)
        banned.add(row, options.suppress_tokens)
    if penalties:
        rows, ids = penalized.to_device(scores.device)
        factors = to_device(np.array(penalties, np.float32), scores.device)
        before = scores[rows, ids]
        scores[rows, ids] = torch.where(before < 0, before * factors, before / factors)
    if banned.rows:
        rows, ids = banned.to_device(scores.device)
        scores[rows, ids] = float("-inf")


def run_processor(processor: LogitsProcessor, sequences: Sequence[SequenceSoFar], scores: Tensor) -> Tensor:
    """Return the scores of one request after its own logits processor: float32[N, V] -> float32[N, V].

    Raises:
        WrongScores: the processor returns something other than scores. It may itself raise anything.
    """
    token_ids = np.array([[*prefix_ids, *token_ids] for _, prefix_ids, token_ids in sequences], np.int64)
    processed = processor(to_device(token_ids, scores.device), scores)
    if not isinstance(processed, Tensor) or processed.shape != scores.shape:
        got = list(processed.shape) if isinstance(processed, Tensor) else type(processed).__name__
        raise WrongScores(f"logits_processor must return scores of shape {list(scores.shape)}, got {got}")
    return processed.to(scores)


class _Entries:
    """Entries of the scores, listed on the host."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.token_ids: list[int] = []

    def add(self, row: int, token_ids: Collection[int]) -> None:
        self.rows.extend([row] * len(token_ids))
        self.token_ids.extend(token_ids)

    def to_device(self, device: torch.device) -> Tensor:
        """int64[2, number of entries]."""
        return to_device(np.array((self.rows, self.token_ids)), device)


def _ngram_endings(token_ids: list[int], ngram_size: int) -> list[int]:
    """Return the tokens that would complete an n-gram that `token_ids` already contains."""
    if ngram_size == 1:
        return token_ids
    num_known = ngram_size - 1
    ending = token_ids[len(token_ids) - num_known :]
    return [
        token_ids[i + num_known]
        for i in range(len(token_ids) - num_known)
        if token_ids[i] == ending[0] and token_ids[i : i + num_known] == ending
    ]


def _bad_word_endings(
    token_ids: list[int], bad_words_ids: Sequence[Sequence[int]], end_ids: Sequence[int]
) -> list[int]:
    """Return the tokens that would complete a bad word; as in the reference, a lone end token is not one."""
    endings = []
    for *beginning, last in bad_words_ids:
        is_begun = token_ids[len(token_ids) - len(beginning) :] == beginning
        if is_begun and len(beginning) <= len(token_ids) and (beginning or last not in end_ids):
            endings.append(last)
    return endings
