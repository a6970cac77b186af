"""How a text is generated: `GenerationOptions`, one frozen value per request.

Names and meanings are those of transformers' `GenerationConfig`; the defaults are greedy
search and 30 new tokens. An option that would have no effect is refused, never ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Literal

_RANGES = {
    "repetition_penalty": (1e-3, 1e3),
    "temperature": (1e-6, 1e6),
    "length_penalty": (-50.0, 50.0),
}
"""Beyond these, float32 scores become infinite or nothing, and a text means nothing."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Options of one request; requests with different options share a batch."""

    max_new_tokens: int = 30
    """Most tokens a text may have, the end token included."""
    min_new_tokens: int = 0
    """Fewest tokens before the end token is allowed."""
    num_beams: int = 1
    """Beams of beam search; 1 is greedy search (or sampling)."""
    length_penalty: float = 1.0
    """Beam scores are divided by length ** length_penalty; above 1 favours longer texts."""
    early_stopping: bool | Literal["never"] = False
    """When beam search ends: True at num_beams finished texts, False when none can improve by the
    usual estimate, "never" when none can improve at all."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that already stand in the text less likely."""
    no_repeat_ngram_size: int = 0
    """No n-gram of this size occurs twice; 0 allows all."""
    do_sample: bool = False
    """Draw tokens at random instead of taking the most likely one."""
    temperature: float = 1.0
    """Divides the logits before sampling."""
    top_k: int = 0
    """Sample among this many most likely tokens only; 0 means all."""
    top_p: float = 1.0
    """Sample among the most likely tokens that together reach this probability."""
    num_return_sequences: int = 1
    """Texts per request: samples, or the best beams."""
    seed: int = 0
    """Seed of this request's own random numbers; neighbours do not disturb them."""
    stop: tuple[str, ...] = ()
    """Texts that end generation; they are cut from the result."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for name, least in (
            ("max_new_tokens", 1),
            ("min_new_tokens", 0),
            ("num_beams", 1),
            ("no_repeat_ngram_size", 0),
            ("top_k", 0),
            ("num_return_sequences", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            is_whole = isinstance(value, Integral) and not isinstance(value, bool)
            _require(is_whole, name, "a whole number", value)
            _require(value >= least, name, f"at least {least}", value)
        _require(self.seed < 1 << 63, "seed", f"below {1 << 63}", self.seed)
        _require(
            self.min_new_tokens <= self.max_new_tokens,
            "min_new_tokens",
            f"at most max_new_tokens ({self.max_new_tokens})",
            self.min_new_tokens,
        )
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
        if not self.do_sample:
            for name in ("temperature", "top_k", "top_p", "seed"):
                self._refuse_changed(name, "it only acts with do_sample=True; set do_sample or drop it")
        if self.num_beams == 1:
            for name in ("length_penalty", "early_stopping"):
                self._refuse_changed(name, "it only acts with num_beams above 1; set num_beams or drop it")
        _require(
            not (self.do_sample and self.num_beams > 1),
            "num_beams",
            "1 when do_sample=True",
            f"{self.num_beams}; choose beam search or sampling",
        )
        most = self.num_beams if not self.do_sample else self.num_return_sequences
        _require(
            self.num_return_sequences <= most,
            "num_return_sequences",
            f"at most num_beams ({self.num_beams}) without sampling",
            f"{self.num_return_sequences}; raise num_beams or set do_sample=True",
        )

    def _refuse_changed(self, name: str, why: str) -> None:
        default = type(self).__dataclass_fields__[name].default
        value = getattr(self, name)
        _require(value == default, name, f"left at {default!r} here", f"{value!r}; {why}")


def _require(holds: bool, field: str, rule: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{field} must be {rule}, got {got}")
