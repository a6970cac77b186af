"""How a text is generated: `GenerationOptions`, one frozen value per request.

Names and meanings are those of transformers' `GenerationConfig`. An option that is not given is taken from
the checkpoint's `generation_config.json`. If that file is silent, it has the default below: greedy search, 30
new tokens. An option that is given and would have no effect is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal

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

_FOR_SAMPLING = ("temperature", "top_k", "top_p", "seed")
"""Options without effect unless do_sample is set."""
_FOR_BEAM_SEARCH = ("length_penalty", "early_stopping")
"""Options without effect unless num_beams is above 1."""


def _unset(default: Any) -> Any:
    """Return a field that is None until `GenerationOptions.resolve` fills it, with this default at last."""
    return field(default=None, metadata={"resolved_default": default})


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Options of one request; requests with different options run in the same batch.

    An option that is not given is None until `resolve` fills it, which an engine does for each request.

    >>> options = GenerationOptions(max_new_tokens=20, stop="\\n")
    >>> options.max_new_tokens, options.stop, options.num_beams
    (20, ('\\n',), None)
    >>> options.resolve({"num_beams": 3}).num_beams, options.resolve().num_beams
    (3, 1)
    >>> GenerationOptions(temperature=0.7).resolve()
    Traceback (most recent call last):
        ...
    ValueError: temperature must be left at 1.0 without do_sample, got 0.7; set do_sample to sample
    """

    max_new_tokens: int = _unset(30)
    """Maximum number of new tokens, including the end token."""
    min_new_tokens: int = _unset(0)
    """Minimum number of new tokens before the end token is allowed."""
    num_beams: int = _unset(1)
    """Number of beams in beam search; 1 means greedy search, or sampling with do_sample."""
    length_penalty: float = _unset(1.0)
    """Beam search divides scores by the length to this power; a larger value favors longer texts."""
    early_stopping: bool | Literal["never"] = _unset(False)
    """When beam search ends: true when as many texts as beams are finished, false when an estimate says that
    no beam can improve, "never" when no beam can improve at all."""
    repetition_penalty: float = _unset(1.0)
    """Values above 1 make tokens that are already in the text less likely."""
    no_repeat_ngram_size: int = _unset(0)
    """No n-gram of this size occurs twice; 0 allows all."""
    do_sample: bool = _unset(False)
    """Select tokens at random by their probability, instead of the most likely one."""
    temperature: float = _unset(1.0)
    """Divides the logits before sampling; values above 1 make unlikely tokens more likely. 0 is greedy
    search, whatever the other options of sampling are."""
    top_k: int = _unset(0)
    """Sample only from this number of most likely tokens; 0 means all tokens."""
    top_p: float = _unset(1.0)
    """Sample only from the most likely tokens that together reach this probability."""
    num_return_sequences: int = _unset(1)
    """Number of texts per request: samples, or the best beams."""
    seed: int = _unset(0)
    """Seed of the random numbers of this request; other requests do not change them."""
    stop: tuple[str, ...] = _unset(())
    """Texts that end generation; they are removed from the result."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str | list):
            object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        require_types(self)
        if self.temperature == 0:
            greedy = {"do_sample": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0}
            for name, value in greedy.items():
                object.__setattr__(self, name, value)
        self._check_ranges()
        self._check_combinations()

    def resolve(self, stored: Mapping[str, Any] = MappingProxyType({})) -> GenerationOptions:
        """Return these options, with those that are not given from `stored` or from the defaults.

        A stored option that has no effect next to the given ones is left out, as in transformers.

        Args:
            stored: options by name, such as `ModelInfo.generation_config`.

        Raises:
            ValueError: the options contradict each other.
        """
        missing = [option for option in fields(self) if getattr(self, option.name) is None]
        if not missing:
            return self
        defaults = {option.name: option.metadata["resolved_default"] for option in missing}
        values = defaults | {name: stored[name] for name in defaults if stored.get(name) is not None}
        if not values.get("do_sample", self.do_sample):
            values |= {name: defaults[name] for name in _FOR_SAMPLING if name in defaults}
        if values.get("num_beams", self.num_beams) == 1:
            values |= {name: defaults[name] for name in _FOR_BEAM_SEARCH if name in defaults}
        return replace(self, **values)

    def _check_ranges(self) -> None:
        for name, minimum in _MINIMA.items():
            value = getattr(self, name)
            if value is None:
                continue
            _require(value >= minimum, name, f"at least {minimum}", value)
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            _require(value is None or low <= value <= high, name, f"from {low:g} to {high:g}", value)
        _require(self.seed is None or self.seed < 1 << 63, "seed", f"below {1 << 63}", self.seed)
        _require(self.top_p is None or 0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        _require(
            self.early_stopping in (None, True, False, "never"),
            "early_stopping",
            "true, false or 'never'",
            self.early_stopping,
        )
        are_texts = all(isinstance(text, str) and text for text in self.stop or ())
        _require(are_texts, "stop", "texts that are not empty", self.stop)

    def _check_combinations(self) -> None:
        """Check what is known: an option that is None can still have any value."""
        if None not in (self.min_new_tokens, self.max_new_tokens):
            _require(
                self.min_new_tokens <= self.max_new_tokens,
                "min_new_tokens",
                f"at most max_new_tokens ({self.max_new_tokens})",
                self.min_new_tokens,
            )
        if self.do_sample is False:
            for name in _FOR_SAMPLING:
                self._require_default(name, "without do_sample", "set do_sample to sample")
        if self.num_beams == 1:
            for name in _FOR_BEAM_SEARCH:
                self._require_default(name, "without beam search", "set num_beams above 1")
        if None in (self.num_beams, self.do_sample):
            return
        _require(
            not (self.do_sample and self.num_beams > 1),
            "num_beams",
            "1 with do_sample",
            f"{self.num_beams}; choose beam search or sampling",
        )
        if self.num_return_sequences is not None:
            _require(
                self.do_sample or self.num_return_sequences <= self.num_beams,
                "num_return_sequences",
                f"at most num_beams ({self.num_beams}) without do_sample",
                f"{self.num_return_sequences}; raise num_beams or set do_sample",
            )

    def _require_default(self, name: str, condition: str, remedy: str) -> None:
        default = type(self).__dataclass_fields__[name].metadata["resolved_default"]
        value = getattr(self, name)
        holds = value is None or value == default
        _require(holds, name, f"left at {default!r} {condition}", f"{value!r}; {remedy}")


def _require(holds: bool, field: str, rule: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{field} must be {rule}, got {got}")
