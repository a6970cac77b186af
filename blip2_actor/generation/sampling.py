"""Drawing tokens at random: many texts at once, each with its own options and its own random number.

A text brings one number of [0, 1) a step, from a generator that is its own, and takes the token in which
that share of the probability, summed over the vocabulary in its order, lies. Nothing here mixes rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blip2_actor.options import GenerationOptions
from blip2_actor.transfer import to_device


def draw(scores: Tensor, options: Sequence[GenerationOptions], shares: Sequence[float]) -> Tensor:
    """One token of each row.

    Args:
        scores: float32[N, V], after penalties and bans.
        shares: N numbers of [0, 1).

    Returns:
        int64[N]; the largest score's where there is nothing to draw from: scores that are no numbers, or
        all tokens banned.
    """
    probabilities = warp(scores, options).softmax(dim=-1)
    sums = probabilities.cumsum(dim=-1, dtype=torch.float64)
    wanted = to_device(shares, scores.device, torch.float64)[:, None] * sums[:, -1:]
    found = torch.searchsorted(sums, wanted, right=True).clamp_(max=scores.shape[1] - 1)
    is_possible = probabilities.gather(1, found) > 0
    return torch.where(is_possible, found, scores.argmax(dim=-1, keepdim=True))[:, 0]


def warp(scores: Tensor, options: Sequence[GenerationOptions]) -> Tensor:
    """Temperature, top-k and top-p as transformers has them: float32[N, V], -inf outside the kept tokens."""
    device = scores.device
    scores = scores / to_device([o.temperature for o in options], device)[:, None]
    if ranked := [row for row, o in enumerate(options) if o.top_k]:
        rows = to_device(ranked, device)
        counts = [min(options[row].top_k, scores.shape[1]) for row in ranked]
        scores[rows] = _keep_best(scores[rows], counts)
    if nuclei := [row for row, o in enumerate(options) if o.top_p < 1.0]:
        rows = to_device(nuclei, device)
        scores[rows] = _keep_nucleus(scores[rows], [options[row].top_p for row in nuclei])
    return scores


def _keep_best(scores: Tensor, counts: list[int]) -> Tensor:
    """Top-k: all that are not below the count-th largest."""
    last = to_device(counts, scores.device)[:, None] - 1
    least = scores.topk(max(counts)).values.gather(1, last)
    return scores.masked_fill_(scores < least, float("-inf"))


def _keep_nucleus(scores: Tensor, shares: list[float]) -> Tensor:
    """Top-p: the most likely tokens that together reach a share of the probability, at least one."""
    ascending, order = scores.sort(dim=-1)
    tails = to_device([1 - share for share in shares], scores.device)[:, None]
    is_tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= tails
    is_tail[:, -1] = False
    return scores.masked_fill_(is_tail.scatter(1, order, is_tail), float("-inf"))
