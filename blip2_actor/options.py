"""How a text is generated: `GenerationOptions`, one frozen value per request.

Names and meanings are those of transformers' `GenerationConfig`. The defaults are greedy search and 30 new
tokens. An option that would have no effect is refused, never ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from blip2_actor.inputs.field_types import require_types

_MINIMA = {
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "top_k": 0,
    "num_return_sequences": 1,
    "seed": 0,
}
"""Smallest values of the whole numbers."""

_RANGES = {
    "repetition_penalty": (1e-3, 1e3),
    "temperature": (1e-6, 1e6),
    "length_penalty": (-50.0, 50.0),
}
"""Outside these ranges, float32 scores become infinite or zero, and the text is meaningless."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Options of one request; requests with different options run in the same batch.

    >>> options = GenerationOptions(max_new_tokens=20, num_beams=3, stop="\\n")
    >>> options.num_beams, options.stop
    (3, ('\\n',))
    >>> GenerationOptions(temperature=0.7)
    Traceback (most recent call last):
        ...
    ValueError: temperature must be left at 1.0 without do_sample, got 0.7; set do_sample to sample
    """

    max_new_tokens: int = 30
    """Maximum number of new tokens, including the end token."""
    min_new_tokens: int = 0
    """Minimum number of new tokens before the end token is allowed."""
    num_beams: int = 1
    """Number of beams in beam search; 1 means greedy search, or sampling with do_sample."""
    length_penalty: float = 1.0
    """Beam search divides scores by the length to this power; a larger value favors longer texts."""
    early_stopping: bool | Literal["never"] = False
    """When beam search ends: true when as many texts as beams are finished, false when an estimate says that
    no beam can improve, "never" when no beam can improve at all."""
    repetition_penalty: float = 1.0
    """Values above 1 make tokens that are already in the text less likely."""
    no_repeat_ngram_size: int = 0
    """No n-gram of this size occurs twice; 0 allows all."""
    do_sample: bool = False
    """Select tokens at random by their probability, instead of the most likely one."""
    temperature: float = 1.0
    """Divides the logits before sampling; values above 1 make unlikely tokens more likely. 0 is greedy
    search, whatever the other options of sampling are."""
    top_k: int = 0
    """Sample only from this number of most likely tokens; 0 means all tokens."""
    top_p: float = 1.0
    """Sample only from the most likely tokens that together reach this probability."""
    num_return_sequences: int = 1
    """Number of texts per request: samples, or the best beams."""
    seed: int = 0
    """Seed of the random numbers of this request; other requests do not change them."""
    stop: tuple[str, ...] = ()
    """Texts that end generation; they are removed from the result."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str | list):
            object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        require_types(self)
        if self.temperature == 0:
            for name in ("do_sample", "temperature", "top_k", "top_p", "seed"):
                object.__setattr__(self, name, type(self).__dataclass_fields__[name].default)
        self._check_ranges()
        self._check_combinations()

    def _check_ranges(self) -> None:
        for name, minimum in _MINIMA.items():
            value = getattr(self, name)
            _require(value >= minimum, name, f"at least {minimum}", value)
        _require(self.seed < 1 << 63, "seed", f"below {1 << 63}", self.seed)
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            _require(low <= value <= high, name, f"from {low:g} to {high:g}", value)
        _require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        _require(
            self.early_stopping in (True, False, "never"),
            "early_stopping",
            "true, false or 'never'",
            self.early_stopping,
        )
        are_texts = all(isinstance(text, str) and text for text in self.stop)
        _require(are_texts, "stop", "texts that are not empty", self.stop)

    def _check_combinations(self) -> None:
        _require(
            self.min_new_tokens <= self.max_new_tokens,
            "min_new_tokens",
            f"at most max_new_tokens ({self.max_new_tokens})",
            self.min_new_tokens,
        )
        if not self.do_sample:
            for name in ("temperature", "top_k", "top_p", "seed"):
                self._require_default(name, "without do_sample", "set do_sample to sample")
        if self.num_beams == 1:
            for name in ("length_penalty", "early_stopping"):
                self._require_default(name, "without beam search", "set num_beams above 1")
        _require(
            not (self.do_sample and self.num_beams > 1),
            "num_beams",
            "1 with do_sample",
            f"{self.num_beams}; choose beam search or sampling",
        )
        _require(
            self.do_sample or self.num_return_sequences <= self.num_beams,
            "num_return_sequences",
            f"at most num_beams ({self.num_beams}) without do_sample",
            f"{self.num_return_sequences}; raise num_beams or set do_sample",
        )

    def _require_default(self, name: str, condition: str, remedy: str) -> None:
        default = type(self).__dataclass_fields__[name].default
        value = getattr(self, name)
        _require(value == default, name, f"left at {default!r} {condition}", f"{value!r}; {remedy}")


def _require(holds: bool, field: str, rule: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{field} must be {rule}, got {got}")
