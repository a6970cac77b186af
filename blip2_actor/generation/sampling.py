"""Sampling: temperature, top_k, top_p, and token selection at random, for many texts at once.

In each step a text brings one number in [0, 1), from a generator of its own. It takes the token at which the
cumulative probability, over the vocabulary in its order, passes that number. No row affects another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blip2_actor.options import GenerationOptions
from blip2_actor.transfer import to_device


def sample(scores: Tensor, options: Sequence[GenerationOptions], uniforms: Sequence[float]) -> Tensor:
    """Select one token per row at random.

    Args:
        scores: float32[N, V], after the logits processors.
        options: N options.
        uniforms: N random numbers in [0, 1).

    Returns:
        int64[N]. A row without a valid probability (NaN or infinite scores, or all tokens banned) takes its
        largest score.
    """
    probabilities = warp(scores, options).softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    thresholds = to_device(uniforms, scores.device, torch.float64)[:, None] * cumulative[:, -1:]
    token_ids = torch.searchsorted(cumulative, thresholds, right=True).clamp_(max=scores.shape[1] - 1)
    is_possible = probabilities.gather(1, token_ids) > 0
    return torch.where(is_possible, token_ids, scores.argmax(dim=-1, keepdim=True))[:, 0]


def warp(scores: Tensor, options: Sequence[GenerationOptions]) -> Tensor:
    """Apply temperature, top_k and top_p, in transformers' order.

    float32[N, V] -> float32[N, V], -inf for tokens that are removed.
    """
    device = scores.device
    scores = scores / to_device([o.temperature for o in options], device)[:, None]
    if with_top_k := [row for row, o in enumerate(options) if o.top_k]:
        rows = to_device(with_top_k, device)
        scores[rows] = _top_k(scores[rows], [min(options[r].top_k, scores.shape[1]) for r in with_top_k])
    if with_top_p := [row for row, o in enumerate(options) if o.top_p < 1.0]:
        rows = to_device(with_top_p, device)
        scores[rows] = _top_p(scores[rows], [options[r].top_p for r in with_top_p])
    return scores


def _top_k(scores: Tensor, top_k: list[int]) -> Tensor:
    """Keep the `top_k` largest scores of each row, and those equal to the smallest of them."""
    last = to_device(top_k, scores.device)[:, None] - 1
    smallest_kept = scores.topk(max(top_k)).values.gather(1, last)
    return scores.masked_fill_(scores < smallest_kept, float("-inf"))


def _top_p(scores: Tensor, top_p: list[float]) -> Tensor:
    """Keep the most likely tokens that together reach the probability `top_p`, at least one."""
    ascending, order = scores.sort(dim=-1)
    max_tail = to_device([1 - p for p in top_p], scores.device)[:, None]
    is_tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= max_tail
    is_tail[:, -1] = False
    return scores.masked_fill_(is_tail.scatter(1, order, is_tail), float("-inf"))
