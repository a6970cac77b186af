"""`Calibration`: the probability that a caption is right, computed from its log-probability and length.

A logistic regression on `FEATURES` gives a score, and a curve that never falls turns the score into a
probability. Both are in a small JSON file. They hold for the model, the prompt and the options with which the
captions were made, and for images like theirs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from blip2_actor.confidence.features import FEATURES, features_of
from blip2_actor.options import GenerationOptions
from blip2_actor.request import Result

ABSTAINED = "abstained"
"""The flag of a caption whose confidence is below the limit."""
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The probability that a caption is right, by a fit on captions whose truth is known.

    Examples:
        >>> result = engine.generate(picture)[0]
        >>> 0 < calibration.confidence(result) < 1
        True
    """

    coefficients: Mapping[str, float]
    """Coefficient of each feature in `FEATURES`."""
    intercept: float
    curve: Sequence[tuple[float, float]]
    """Scores, ascending, and the probability at each; in between, it is interpolated."""
    model: str
    """`ModelInfo.digest` of the model that has made the captions."""
    prompt: str | None = None
    """The prompt of the captions; None for captions without one."""
    row_prompts: bool = False
    """Whether each image had a prompt of its own, such as a question."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options of generation, resolved, as plain values of JSON."""
    num_examples: int = 0
    """Captions on which it was fitted."""
    accuracy: float = math.nan
    """Fraction of them that is right."""
    calibration_error: float = math.nan
    """Expected calibration error on examples that were held out, in ten bins of equal size."""
    auroc: float = math.nan
    """Probability that a right caption has a higher confidence than a wrong one, on held-out examples."""

    def __post_init__(self) -> None:
        if set(self.coefficients) != set(FEATURES):
            raise ValueError(
                f"coefficients must be given for {', '.join(FEATURES)}, got {', '.join(self.coefficients)}"
            )
        object.__setattr__(self, "curve", tuple((score, probability) for score, probability in self.curve))
        scores, probabilities = [p[0] for p in self.curve], [p[1] for p in self.curve]
        if not all(map(math.isfinite, (self.intercept, *self.coefficients.values(), *scores))):
            raise ValueError("coefficients and scores must be finite; fit the calibration again")
        if not scores or scores != sorted(scores) or not all(0 <= one <= 1 for one in probabilities):
            raise ValueError("curve must have ascending scores with probabilities from 0 to 1")
        object.__setattr__(self, "options", json.loads(json.dumps(self.options)))
        _ = self._options  # raises for options that this version does not know

    def confidence(self, result: Result) -> float | None:
        """Return the probability that the best text of a result is right; None if it has no text."""
        if not result.ok or result.logprob is None:
            return None
        return self.probability(result.logprob, len(result.token_ids))

    def probability(self, logprob: float, num_tokens: int) -> float:
        """Return the probability that a text is right.

        Args:
            logprob: sum of the log-probabilities of its tokens, natural log.
            num_tokens: its tokens, the end token included.
        """
        values = zip(FEATURES, features_of(logprob, num_tokens), strict=True)
        return self._at(self.intercept + sum(self.coefficients[name] * value for name, value in values))

    def _at(self, score: float) -> float:
        """Return the probability at a score; beyond the ends of the curve, that of its ends."""
        after = bisect_right(self.curve, score, key=lambda point: point[0])
        if after in (0, len(self.curve)):
            return self.curve[min(after, len(self.curve) - 1)][1]
        (left, low), (right, high) = self.curve[after - 1 : after + 1]
        return low + (high - low) * (score - left) / (right - left)

    def fits(self, model: str, prompt: str | None, options: GenerationOptions) -> bool:
        """Return whether it holds for captions that are made in this way.

        Args:
            model: `ModelInfo.digest`.
            prompt: the prompt of the image.
            options: resolved.
        """
        return self.misfit(model, prompt, options) is None

    def misfit(self, model: str, prompt: str | None, options: GenerationOptions) -> str | None:
        """Return what differs from the captions of the fit, in words; None if nothing does.

        Args:
            model, prompt, options: as for `fits`.
        """
        if model != self.model:
            return "model"
        if not self.row_prompts and (prompt or None) != self.prompt:
            return "prompt"
        return None if options == self._options else "options of generation"

    @cached_property
    def _options(self) -> GenerationOptions:
        values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in self.options.items()}
        return GenerationOptions(**values).resolve()

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of all that decides a confidence."""
        parts = [sorted(self.coefficients.items()), self.intercept, self.curve]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        values = {"format_version": FORMAT_VERSION, **asdict(self)}
        Path(path).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` has written.

        Args:
            path: a file here, or the URI of one in a bucket.

        Raises:
            ValueError: the file cannot be read, or is no calibration; or the URI holds a password.
        """
        name = os.fspath(path)
        if "://" in name:
            from blip2_actor.checkpoints.checkpoint import require_no_secret  # imports torch
            from blip2_actor.checkpoints.download import read_from_bucket

            require_no_secret("calibration", name)
            try:
                return cls.parse(read_from_bucket(name), name)
            except OSError as error:
                raise ValueError(f"calibration must be a file that can be read: {error}") from error
        try:
            return cls.parse(Path(name).read_bytes(), name)
        except OSError as error:
            raise ValueError(_unusable(name, error)) from error

    @classmethod
    def parse(cls, content: bytes, name: str) -> Self:
        """Return the calibration in the content of a file.

        Args:
            name: of the file, for errors.

        Raises:
            ValueError: it is no calibration.
        """
        try:
            values = json.loads(content)
            version = values.pop("format_version")
            if version != FORMAT_VERSION:
                raise ValueError(f"its format version is {version}, and this version reads {FORMAT_VERSION}")
            known = {one.name for one in fields(cls)}
            return cls(**{name: value for name, value in values.items() if name in known})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(_unusable(name, error)) from error


def _unusable(name: str, error: Exception) -> str:
    reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return f"calibration must be a file of blip2 calibrate, got {name}: {reason}"


def abstention_flags(confidence: float | None, min_confidence: float) -> list[str]:
    """Return the flag of a caption that is not sure enough, or no flag."""
    return [ABSTAINED] if confidence is not None and confidence < min_confidence else []
