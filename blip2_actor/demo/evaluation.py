"""The accuracy of a checkpoint: captions that are right word for word, and what is wrong in the others."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest

import torch
from transformers import Blip2ForConditionalGeneration, PreTrainedTokenizerBase

from blip2_actor.demo.grammar import BACKGROUNDS, COLORS, SHAPES

BATCH_IMAGES = 250

_KINDS = {
    **dict.fromkeys(COLORS, "colour"),
    **dict.fromkeys(SHAPES, "shape"),
    **dict.fromkeys(("above", "left", "right"), "arrangement"),
    **dict.fromkeys(BACKGROUNDS, "background"),
}


@dataclass(frozen=True, kw_only=True)
class CaptionAccuracy:
    """Fractions between 0 and 1."""

    exact: float
    """Captions that are right word for word."""
    by_kind: dict[str, float]
    """Words that are right at their position, by kind: colour, shape, arrangement, background, other."""
    wrong: tuple[tuple[str, str], ...]
    """(caption, correct caption) of the first twenty wrong captions."""


@torch.inference_mode()
def generate_captions(
    model: Blip2ForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, pixel_values: torch.Tensor
) -> list[str]:
    """Caption float32[N, 3, S, S] by greedy search with transformers' own `generate`."""
    captions: list[str] = []
    start = model.config.num_query_tokens + 1
    for batch in pixel_values.split(BATCH_IMAGES):
        token_ids = model.generate(pixel_values=batch, max_new_tokens=30, do_sample=False)
        captions += tokenizer.batch_decode(token_ids[:, start:], skip_special_tokens=True)
    return captions


def score_captions(captions: list[str], truths: list[str]) -> CaptionAccuracy:
    """Compare captions with the correct captions."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for caption, truth in zip(captions, truths, strict=True):
        for said, word in zip_longest(caption.split(), truth.split()):
            kind = _KINDS.get(word, "other")
            total[kind] += 1
            right[kind] += said == word
    wrong = [(c, t) for c, t in zip(captions, truths, strict=True) if c != t]
    return CaptionAccuracy(
        exact=(len(truths) - len(wrong)) / len(truths),
        by_kind={kind: right[kind] / total[kind] for kind in sorted(total)},
        wrong=tuple(wrong[:20]),
    )
