"""Logits processors: what the options do to one text's scores before a token is chosen.

Same meaning and order as transformers' `LogitsProcessorList` (generation/logits_process.py); each works
in place on float32[V].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blip2_actor.options import GenerationOptions


def penalizes(options: GenerationOptions) -> bool:
    """True where scores depend on what the text already holds."""
    return options.repetition_penalty != 1.0 or options.no_repeat_ngram_size > 0


def process(
    scores: Tensor,
    options: GenerationOptions,
    context: Sequence[int],
    num_new_tokens: int,
    end_ids: Sequence[int],
) -> None:
    """Apply penalties and bans.

    Args:
        scores: float32[V], logits or log-probabilities; changed in place.
        context: all token ids so far as the reference sees them: image tokens, prompt, new tokens.
        num_new_tokens: how many of them are new.
        end_ids: the checkpoint's end tokens.
    """
    if options.repetition_penalty != 1.0 and context:
        seen = torch.tensor(sorted(set(context)), device=scores.device)
        found = scores[seen]
        penalty = options.repetition_penalty
        scores[seen] = torch.where(found < 0, found * penalty, found / penalty)
    if options.no_repeat_ngram_size > 0:
        banned = _continuations(context, options.no_repeat_ngram_size)
        if banned:
            scores[torch.tensor(banned, device=scores.device)] = float("-inf")
    if num_new_tokens < options.min_new_tokens:
        scores[list(end_ids)] = float("-inf")


def _continuations(context: Sequence[int], size: int) -> list[int]:
    """Tokens that would repeat an n-gram of `context`."""
    if len(context) + 1 < size:
        return []
    ending = tuple(context[len(context) - size + 1 :])
    starts = range(len(context) - size + 1)
    return [context[i + size - 1] for i in starts if tuple(context[i : i + size - 1]) == ending]


def warp(scores: Tensor, options: GenerationOptions) -> Tensor:
    """Temperature, top-k and top-p: float32[V] -> float32[V] with -inf outside the kept tokens."""
    scores = scores / options.temperature
    if options.top_k:
        kth = scores.topk(min(options.top_k, scores.shape[-1])).values[-1]
        scores = scores.masked_fill(scores < kth, float("-inf"))
    if options.top_p < 1.0:
        ascending, order = scores.sort(descending=False)
        removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - options.top_p
        removed[-1] = False
        scores = scores.masked_fill(torch.zeros_like(removed).scatter(0, order, removed), float("-inf"))
    return scores
