"""Logits processors: what the options do to the scores of running texts before tokens are chosen.

Same meaning and order as transformers' `LogitsProcessorList` (generation/logits_process.py), for all texts
of a step at once. What a penalty touches is listed on the host and sent to the device in one piece.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from blip2_actor.options import GenerationOptions
from blip2_actor.transfer import to_device


class SequenceSoFar(NamedTuple):
    """A text so far."""

    options: GenerationOptions
    context: Sequence[int]
    """What the reference's logits processors see before the first new token: image tokens and prompt."""
    token_ids: Sequence[int]
    """New tokens."""


def penalizes(options: GenerationOptions) -> bool:
    """True where scores depend on what the text already holds."""
    return options.repetition_penalty != 1.0 or options.no_repeat_ngram_size > 0


def process(scores: Tensor, drafts: Sequence[SequenceSoFar], end_ids: Sequence[int]) -> None:
    """Apply penalties and bans.

    Args:
        scores: float32[N, V], logits or log-probabilities, changed in place.
        drafts: N texts.
        end_ids: the checkpoint's end tokens.
    """
    penalised: tuple[list[int], list[int]] = [], []  # rows, tokens
    penalties: list[float] = []
    banned: tuple[list[int], list[int]] = [], []
    for row, (options, context, token_ids) in enumerate(drafts):
        if options.repetition_penalty != 1.0:
            penalties += [options.repetition_penalty] * _add(penalised, row, {*context, *token_ids})
        if options.no_repeat_ngram_size > 0:
            _add(banned, row, _continuations([*context, *token_ids], options.no_repeat_ngram_size))
        if len(token_ids) < options.min_new_tokens:
            _add(banned, row, end_ids)
    if penalties:
        rows, ids = to_device(np.array(penalised), scores.device)
        factors = to_device(np.array(penalties, np.float32), scores.device)
        before = scores[rows, ids]
        scores[rows, ids] = torch.where(before < 0, before * factors, before / factors)
    if banned[0]:
        rows, ids = to_device(np.array(banned), scores.device)
        scores[rows, ids] = float("-inf")


def _add(places: tuple[list[int], list[int]], row: int, token_ids: Collection[int]) -> int:
    """Note tokens of one row; how many they are."""
    places[0].extend([row] * len(token_ids))
    places[1].extend(token_ids)
    return len(token_ids)


def _continuations(token_ids: list[int], size: int) -> list[int]:
    """Tokens that would repeat an n-gram of `token_ids`."""
    if size == 1:
        return token_ids
    num_known = size - 1
    ending = token_ids[len(token_ids) - num_known :]
    return [
        token_ids[i + num_known]
        for i in range(len(token_ids) - num_known)
        if token_ids[i] == ending[0] and token_ids[i : i + num_known] == ending
    ]
