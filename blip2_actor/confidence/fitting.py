"""Fit a calibration on captions whose truth is known, and measure how good it is. Needs NumPy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blip2_actor.confidence.calibration import Calibration
from blip2_actor.confidence.features import FEATURES, features_of

MIN_EXAMPLES = 50
NUM_PARTS = 5
"""Each part is held out once, to measure the fit of the others on it."""
NUM_BINS = 10
PENALTY = 1e-2
"""Weight of the squared coefficients, which keeps them finite if right and wrong captions are separable."""
MAX_STEPS = 50
MIN_GROUPS, MAX_GROUPS, GROUP_SIZE = 4, 20, 50
"""Points of the curve: more of them follow it closer, and each needs examples."""


def fit_calibration(
    examples: Sequence[tuple[float, int]], is_right: Sequence[bool], made_by: Mapping[str, Any]
) -> Calibration:
    """Fit the probability that a caption is right.

    Args:
        examples: log-probability and number of tokens of each caption.
        is_right: whether each caption is right.
        made_by: `model`, `prompt`, `row_prompts` and `options` of the `Calibration`.

    Returns:
        A fit on all examples; its calibration error and AUROC are of examples held out in turn.

    Raises:
        ValueError: there are too few examples, or all are right, or all wrong; or one has no log-probability,
            or `is_right` has another length.
    """
    _require_pairs(examples, is_right)
    right = np.asarray(is_right, bool)
    num_rarer = int(min(right.sum(), (~right).sum()))
    if len(right) < MIN_EXAMPLES or num_rarer < NUM_PARTS:
        raise ValueError(
            f"a calibration needs at least {MIN_EXAMPLES} captions with a known truth, {NUM_PARTS} of them "
            f"right and {NUM_PARTS} wrong, got {len(right)}, of which {int(right.sum())} are right; caption "
            "more images"
        )
    # The last column is that of the intercept.
    values = np.array([(*features_of(logprob, num_tokens), 1.0) for logprob, num_tokens in examples])
    parts = np.random.default_rng(0).permutation(len(right)) % NUM_PARTS
    held_out = np.empty(len(right))
    for part in range(NUM_PARTS):
        is_held_out = parts == part
        weights, scores, probabilities = _fit(values[~is_held_out], right[~is_held_out])
        held_out[is_held_out] = np.interp(values[is_held_out] @ weights, scores, probabilities)
    weights, scores, probabilities = _fit(values, right)
    *coefficients, intercept = weights.tolist()
    return Calibration(
        coefficients=dict(zip(FEATURES, coefficients, strict=True)),
        intercept=intercept,
        curve=tuple(zip(scores.tolist(), probabilities.tolist(), strict=True)),
        num_examples=len(right),
        accuracy=float(right.mean()),
        calibration_error=expected_calibration_error(held_out, right),
        auroc=auroc(held_out, right),
        **made_by,
    )


def _require_pairs(examples: Sequence[tuple[float, int]], is_right: Sequence[bool]) -> None:
    if len(is_right) != len(examples):
        raise ValueError(f"is_right must be one per example ({len(examples)}), got {len(is_right)}")
    for index, (logprob, _) in enumerate(examples):
        if logprob is None or not math.isfinite(logprob):
            raise ValueError(
                f"examples must have finite log-probabilities, got {logprob} at index {index}; leave out "
                "captions without one"
            )


def expected_calibration_error(
    confidence: np.ndarray, is_right: np.ndarray, num_bins: int = NUM_BINS
) -> float:
    """Return the mean distance of confidence and accuracy, over bins of equally many examples.

    Args:
        confidence: float[N].
        is_right: bool[N].
    """
    order = np.argsort(confidence, kind="stable")
    bins = np.array_split(order, num_bins)
    gaps = [abs(confidence[one].mean() - is_right[one].mean()) * len(one) for one in bins if len(one)]
    return float(sum(gaps) / len(order))


def auroc(confidence: np.ndarray, is_right: np.ndarray) -> float:
    """Return the probability that a right example has a higher confidence than a wrong one; ties count half.

    Args:
        confidence: float[N].
        is_right: bool[N].
    """
    _, places, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    num_right = int(is_right.sum())
    num_wrong = len(is_right) - num_right
    return float((ranks[is_right].sum() - num_right * (num_right + 1) / 2) / (num_right * num_wrong))


def _fit(values: np.ndarray, is_right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the weights of the features, the intercept last, and the curve: scores and probabilities."""
    weights = _regress(values, is_right)
    return weights, *_curve(values @ weights, is_right)


def _curve(scores: np.ndarray, is_right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean score and the share that is right of groups of equal size, never falling.

    Half an example of each kind is added to a group, so that none is certain.
    """
    num_groups = min(MAX_GROUPS, max(MIN_GROUPS, len(scores) // GROUP_SIZE))
    groups = np.array_split(np.argsort(scores, kind="stable"), num_groups)
    pooled: list[tuple[float, float, int]] = []
    for group in groups:
        score, number = float(scores[group].mean()), len(group)
        share = (float(is_right[group].sum()) + 0.5) / (number + 1)
        while pooled and (pooled[-1][1] >= share or pooled[-1][0] >= score):  # pool adjacent violators
            before_score, before_share, before = pooled.pop()
            score = (score * number + before_score * before) / (number + before)
            share = (share * number + before_share * before) / (number + before)
            number += before
        pooled.append((score, share, number))
    return np.array([score for score, _, _ in pooled]), np.array([share for _, share, _ in pooled])


def _regress(values: np.ndarray, is_right: np.ndarray) -> np.ndarray:
    """Return the coefficients of a logistic regression, the intercept last, by Newton's method."""
    mean, scale = values.mean(axis=0), values.std(axis=0)
    mean[-1] = 0.0
    scale[scale < 1e-9] = 1.0
    x = (values - mean) / scale
    penalty = np.full(x.shape[1], PENALTY)
    penalty[-1] = 0.0
    weights = np.zeros(x.shape[1])
    for _ in range(MAX_STEPS):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -500, 500)))
        gradient = x.T @ (p - is_right) + penalty * weights
        curvature = (x * np.maximum(p * (1 - p), 1e-9)[:, None]).T @ x + np.diag(penalty + 1e-9)
        step = np.linalg.solve(curvature, gradient)
        weights -= step
        if np.abs(step).max() < 1e-9:
            break
    weights /= scale
    weights[-1] -= mean @ weights
    return weights
