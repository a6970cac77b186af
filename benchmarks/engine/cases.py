"""The cases of the engine's benchmark: model, work, and the ratio to reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Case:
    """One comparison of the engine with the reference."""

    model: str
    """"demo", or a size of `random_config`."""
    dtype: Dtype = "float32"
    """Dtype of the engine."""
    reference_dtype: str | None = None
    """Dtype of the reference; None takes the engine's."""
    num_images: int = 32
    lengths: tuple[int, int] = (4, 30)
    """Minimum and maximum of the forced number of new tokens of a text, drawn uniformly with a seed; with 0 a
    text ends by itself."""
    prompts: tuple[str | None, ...] = (None,)
    """Prompts for each image."""
    num_beams: int = 1
    reference_batches: Sequence[int] = (8, 16, 32)
    """Batch sizes of the reference; an empty sequence leaves the reference out."""
    reference_images: int | None = None
    """Number of images for the reference, timed per image, if it is too slow for all of them."""
    max_slots: int | None = None
    skip_self_test: bool = False
    """For random weights whose logits change with every rounding: T5 does not divide attention scores by the
    root of the width, so those of random weights are large."""
    rounds: int = 3
    limit: float | None = None
    """The highest ratio that is possible, by arithmetic."""
    to_reach: float | None = None
    """Ratio to reach over the reference at its best batch size."""
    to_reach_at: tuple[int, float] | None = None
    """A batch size that users choose, and the ratio to reach over the reference at that size."""
    images_per_s_to_reach: float | None = None
    images_per_s_limit: float | None = None
    """The highest possible rate on one H200, by arithmetic."""


QUESTIONS = tuple(
    f"Question: what is {thing}? Answer:" for thing in ("this", "on the left", "behind", "its colour")
)
STEADY: dict[str, Any] = {"num_images": 64, "reference_batches": (16, 32, 64)}
"""Enough images that the start and end are a small part of a run."""
TWENTY_TOKENS = (20, 20)

CASES = {
    "midsize-float32": Case("midsize", **STEADY, limit=1.56, to_reach=1.25),
    "midsize-bfloat16": Case("midsize", "bfloat16", "bfloat16", **STEADY, limit=2.0, to_reach=1.4),
    "midsize-default": Case("midsize", "auto", "float32", **STEADY, limit=4.15, to_reach=2.8),
    "midsize-long": Case("midsize", lengths=(4, 64), to_reach=1.4),
    "midsize-questions": Case(
        "midsize",
        lengths=(4, 64),
        prompts=QUESTIONS,
        num_images=16,
        reference_batches=(16, 32),
        to_reach=2.5,
    ),
    "midsize-beams": Case(
        "midsize",
        num_beams=5,
        lengths=TWENTY_TOKENS,
        num_images=16,
        reference_batches=(8, 16),
        limit=1.85,
        to_reach=1.3,
    ),
    "demo": Case(
        "demo",
        num_images=1024,
        lengths=(0, 0),
        reference_batches=(64, 128, 256, 512),
        limit=1.8,
        to_reach=1.2,
    ),
    "demo-16": Case("demo", num_images=512, reference_batches=(16,), max_slots=16, to_reach=2.0),
    "opt-2.7b-cpu": Case(
        "blip2-opt-2.7b", "bfloat16", num_images=4, lengths=TWENTY_TOKENS, reference_batches=(), rounds=1
    ),
    "opt-2.7b": Case(
        "blip2-opt-2.7b",
        "bfloat16",
        "bfloat16",
        num_images=3072,
        reference_images=512,
        lengths=TWENTY_TOKENS,
        reference_batches=(32, 64, 128, 256),
        to_reach=1.3,
        to_reach_at=(32, 4.0),
        images_per_s_to_reach=600,
        images_per_s_limit=986,
    ),
    "opt-2.7b-beams": Case(
        "blip2-opt-2.7b",
        "bfloat16",
        "bfloat16",
        num_images=1024,
        reference_images=128,
        lengths=TWENTY_TOKENS,
        num_beams=5,
        reference_batches=(16, 32, 64),
        to_reach=1.5,
        to_reach_at=(16, 3.0),
    ),
    "flan-t5-xl": Case(
        "blip2-flan-t5-xl",
        "bfloat16",
        "bfloat16",
        num_images=3072,
        reference_images=512,
        lengths=TWENTY_TOKENS,
        reference_batches=(32, 64, 128),
        skip_self_test=True,
        images_per_s_to_reach=600,
        images_per_s_limit=1161,
    ),
}

_ON_GPU = ("opt-2.7b", "opt-2.7b-beams", "flan-t5-xl")
DEFAULT_CASES = {"cpu": tuple(name for name in CASES if name not in _ON_GPU), "cuda": _ON_GPU}
"""The cases that run by default on each type of device."""
MAX_VISION_IMAGES = {"cpu": 32, "cuda": 256}
"""Number of images for the vision encoder alone. On a GPU it is a multiple of the batch: compiled encoders
would otherwise compile for other sizes too."""
