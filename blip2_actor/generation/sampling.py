"""Sampling: temperature, top_k, top_p, min_p, typical_p, and selection at random, for many texts at once.

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
    return _draw(warp(scores, options), to_device(uniforms, scores.device, torch.float64))


def draw_without_replacement(scores: Tensor, uniforms: Sequence[Sequence[float]]) -> Tensor:
    """Select several entries of each row at random, one after the other, none of them twice.

    Args:
        scores: float32[G, N], unnormalized log-probabilities.
        uniforms: G times M random numbers in [0, 1).

    Returns:
        int64[G, M], in the order of selection. A row with fewer than M possible entries goes on with others.
    """
    remaining = scores.clamp(min=torch.finfo(scores.dtype).min)
    selected = []
    for numbers in to_device(uniforms, scores.device, torch.float64).unbind(1):
        selected.append(_draw(remaining, numbers))
        remaining = remaining.scatter(1, selected[-1][:, None], float("-inf"))
    return torch.stack(selected, dim=1)


def _draw(scores: Tensor, uniforms: Tensor) -> Tensor:
    """Select one entry per row: float32[N, V], float64[N] -> int64[N]."""
    probabilities = scores.softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    thresholds = uniforms[:, None] * cumulative[:, -1:]
    token_ids = torch.searchsorted(cumulative, thresholds, right=True).clamp_(max=scores.shape[1] - 1)
    is_possible = probabilities.gather(1, token_ids) > 0
    return torch.where(is_possible, token_ids, scores.argmax(dim=-1, keepdim=True))[:, 0]


def warp(scores: Tensor, options: Sequence[GenerationOptions], min_kept: int = 1) -> Tensor:
    """Apply temperature, top_k, top_p, min_p and typical_p, in transformers' order.

    Args:
        scores: float32[N, V].
        options: N options.
        min_kept: each of them keeps at least this number of tokens.

    Returns:
        float32[N, V], -inf for tokens that are removed.
    """
    device = scores.device
    scores = scores / to_device([o.temperature for o in options], device)[:, None]
    if with_top_k := [row for row, o in enumerate(options) if o.top_k]:
        rows = to_device(with_top_k, device)
        kept = [min(max(options[r].top_k, min_kept), scores.shape[1]) for r in with_top_k]
        scores[rows] = _top_k(scores[rows], kept)
    if with_top_p := [row for row, o in enumerate(options) if o.top_p < 1.0]:
        rows = to_device(with_top_p, device)
        scores[rows] = _top_p(scores[rows], [options[r].top_p for r in with_top_p], min_kept)
    if with_min_p := [row for row, o in enumerate(options) if o.min_p > 0.0]:
        rows = to_device(with_min_p, device)
        scores[rows] = _min_p(scores[rows], [options[r].min_p for r in with_min_p], min_kept)
    if with_typical_p := [row for row, o in enumerate(options) if o.typical_p < 1.0]:
        rows = to_device(with_typical_p, device)
        scores[rows] = _typical_p(scores[rows], [options[r].typical_p for r in with_typical_p], min_kept)
    return scores


def _top_k(scores: Tensor, top_k: list[int]) -> Tensor:
    """Keep the `top_k` largest scores of each row, and those equal to the smallest of them."""
    last = to_device(top_k, scores.device)[:, None] - 1
    smallest_kept = scores.topk(max(top_k)).values.gather(1, last)
    return scores.masked_fill_(scores < smallest_kept, float("-inf"))


def _top_p(scores: Tensor, top_p: list[float], min_kept: int) -> Tensor:
    """Keep the most likely tokens that together reach the probability `top_p`."""
    ascending, order = scores.sort(dim=-1)
    max_tail = to_device([1 - p for p in top_p], scores.device)[:, None]
    is_tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= max_tail
    is_tail[:, -min_kept:] = False
    return scores.masked_fill_(is_tail.scatter(1, order, is_tail), float("-inf"))


def _min_p(scores: Tensor, min_p: list[float], min_kept: int) -> Tensor:
    """Keep the tokens with at least the fraction `min_p` of the largest probability."""
    probabilities = scores.softmax(dim=-1)
    is_unlikely = probabilities < to_device(min_p, scores.device)[:, None] * probabilities.amax(
        -1, keepdim=True
    )
    is_unlikely.scatter_(1, probabilities.topk(min(min_kept, scores.shape[1])).indices, False)
    return scores.masked_fill_(is_unlikely, float("-inf"))


def _typical_p(scores: Tensor, typical_p: list[float], min_kept: int) -> Tensor:
    """Keep the tokens whose information is closest to the entropy, and that together reach `typical_p`."""
    logprobs = scores.log_softmax(dim=-1)
    entropy = -(logprobs * logprobs.exp()).nansum(-1, keepdim=True)
    distances, order = (-logprobs - entropy).abs().sort(dim=-1)
    cumulative = scores.gather(1, order).softmax(dim=-1).cumsum(dim=-1)
    last = (cumulative < to_device(typical_p, scores.device)[:, None]).sum(dim=1, keepdim=True)
    is_atypical = distances > distances.gather(1, last.clamp_(max=scores.shape[1] - 1))
    is_atypical[:, :min_kept] = False
    return scores.masked_fill_(is_atypical.scatter(1, order, is_atypical), float("-inf"))
