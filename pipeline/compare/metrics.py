"""Exact match, BLEU-4 and CIDEr of captions against references, without Java.

Texts are compared in lower case and without punctuation. The official evaluation of COCO splits words with a
Java program; its figures differ from these by a little. CIDEr is what that evaluation calls so (CIDEr-D of
arXiv:1411.5726 with sigma 6), BLEU-4 that of the whole corpus (Papineni et al., 2002), not smoothed.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ORDERS = (1, 2, 3, 4)
SIGMA = 6.0
NUM_RESAMPLES = 1_000
CONFIDENCE = 0.95
_PUNCTUATION = re.compile(r"[^\w\s'-]|(?<!\w)['-]|['-](?!\w)")

Words = tuple[str, ...]
NGrams = Counter[Words]


@dataclass(frozen=True)
class Score:
    """One metric of both runs on the same images."""

    before: float
    after: float
    low: float
    """Lower end of the 95 % interval of the difference, by resampling the images."""
    high: float

    @property
    def change(self) -> float:
        return self.after - self.before


def words_of(text: str) -> Words:
    """Split a text into the words that metrics compare."""
    return tuple(_PUNCTUATION.sub(" ", text.lower()).split())


def n_grams(words: Words) -> NGrams:
    """Count all n-grams of one to four words."""
    return Counter(words[i : i + n] for n in ORDERS for i in range(len(words) - n + 1))


def compare_scores(
    before: Sequence[str], after: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, Score]:
    """Return each metric of two lists of captions, with an interval of the difference.

    Args:
        before: captions of the first run.
        after: captions of the second run, of the same images.
        references: the right captions of each image, at least one; there is at least one image.
    """
    targets = [[words_of(text) for text in texts] for texts in references]
    found = [[words_of(text) for text in texts] for texts in (before, after)]
    frequencies = document_frequencies(targets)
    columns = [
        np.column_stack(
            [
                [float(words in texts) for words, texts in zip(side, targets, strict=True)],
                cider_scores(side, targets, frequencies),
                bleu_statistics(side, targets),
            ]
        )
        for side in found
    ]
    random = np.random.default_rng(0)
    number = len(targets)
    drawn = (np.bincount(random.integers(0, number, number), minlength=number) for _ in range(NUM_RESAMPLES))
    resampled = [[weights @ side / number for side in columns] for weights in drawn]
    edge = (1 - CONFIDENCE) / 2
    scores = {}
    for name, metric in METRICS.items():
        a, b = (metric(side.mean(axis=0)) for side in columns)
        changes = [metric(after) - metric(before) for before, after in resampled]
        low, high = np.quantile(changes, [edge, 1 - edge]).tolist()
        scores[name] = Score(a, b, low, high)
    return scores


def document_frequencies(references: Sequence[Sequence[Words]]) -> Counter[Words]:
    """Return in how many images each n-gram occurs in a reference."""
    found: Counter[Words] = Counter()
    for texts in references:
        found.update({gram for words in texts for gram in n_grams(words)})
    return found


def cider_scores(
    captions: Sequence[Words], references: Sequence[Sequence[Words]], frequencies: Mapping[Words, int]
) -> list[float]:
    """Return the CIDEr of each caption; the CIDEr of a run is their mean. 10 is the highest value."""
    log_images = math.log(len(references)) if len(references) > 1 else 0.0
    scores = []
    for words, texts in zip(captions, references, strict=True):
        caption = _Vector.of(words, frequencies, log_images)
        similar = [caption.similarity(_Vector.of(text, frequencies, log_images)) for text in texts]
        scores.append(10.0 * sum(similar) / len(similar))
    return scores


@dataclass(frozen=True)
class _Vector:
    """The weights of the n-grams of a text (term frequency, inverse document frequency), for each n."""

    weights: tuple[dict[Words, float], ...]
    norms: tuple[float, ...]
    num_bigrams: int
    """Number of bigrams, by which the official evaluation compares lengths."""

    @classmethod
    def of(cls, words: Words, frequencies: Mapping[Words, int], log_images: float) -> _Vector:
        weights: tuple[dict[Words, float], ...] = tuple({} for _ in ORDERS)
        for gram, count in n_grams(words).items():
            inverse = log_images - math.log(max(1, frequencies.get(gram, 0)))
            weights[len(gram) - 1][gram] = count * inverse
        norms = tuple(math.sqrt(sum(w * w for w in of_order.values())) for of_order in weights)
        return cls(weights, norms, max(0, len(words) - 1))

    def similarity(self, reference: _Vector) -> float:
        """Return the mean over n of the clipped cosine, lowered when the lengths differ."""
        total = 0.0
        for mine, theirs, norm, other in zip(
            self.weights, reference.weights, self.norms, reference.norms, strict=True
        ):
            dot = sum(min(w, theirs[gram]) * theirs[gram] for gram, w in mine.items() if gram in theirs)
            total += dot / (norm * other) if norm and other else 0.0
        delta = self.num_bigrams - reference.num_bigrams
        return total / len(ORDERS) * math.exp(-(delta**2) / (2 * SIGMA**2))


def bleu_statistics(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """Return float64[n, 10]: matches and n-grams for n = 1 to 4, caption length, nearest reference length."""
    rows = []
    for words, texts in zip(captions, references, strict=True):
        most: NGrams = Counter()
        for text in texts:
            most |= n_grams(text)
        matches = n_grams(words) & most
        nearest = min((len(text) for text in texts), key=lambda length: (abs(length - len(words)), length))
        by_order = [sum(c for gram, c in matches.items() if len(gram) == n) for n in ORDERS]
        rows.append([*by_order, *(max(0, len(words) - n + 1) for n in ORDERS), len(words), nearest])
    return np.array(rows, float)


def _exact(means: np.ndarray) -> float:
    return float(means[0])


def _cider(means: np.ndarray) -> float:
    return float(means[1])


def _bleu(means: np.ndarray) -> float:
    matches, grams, (length, reference) = means[2:6], means[6:10], means[10:12]
    if not matches.all() or not grams.all():
        return 0.0
    brevity = min(0.0, 1 - reference / length)
    return float(math.exp(brevity + np.log(matches / grams).mean()))


METRICS = {"exact match": _exact, "BLEU-4": _bleu, "CIDEr": _cider}
"""Each is made of the mean of what `compare_scores` finds for one image."""
