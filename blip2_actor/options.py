"""How a text is generated: `GenerationOptions`, one frozen value per request.

Names and meanings are those of transformers' `GenerationConfig`. An option that is not given is taken from
the checkpoint's `generation_config.json`. If that file is silent, it has the default below: greedy search, 30
new tokens. An option that is given and would have no effect is refused, never ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from math import inf
from types import MappingProxyType
from typing import Any, Literal

from blip2_actor.inputs.field_types import require_types

_RANGES = {
    "max_new_tokens": (1, inf),
    "min_new_tokens": (0, inf),
    "num_beams": (1, inf),
    "no_repeat_ngram_size": (0, inf),
    "top_k": (0, inf),
    "num_return_sequences": (1, inf),
    "seed": (0, inf),
    "repetition_penalty": (1e-3, 1e3),
    "temperature": (1e-6, 1e6),
    "min_p": (0, 1),
    "length_penalty": (-50, 50),
}
"""Smallest and largest values. With other penalties and temperatures, float32 scores become infinite or zero,
and the text is meaningless."""

_FOR_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed")
"""Options without effect unless do_sample is set."""
_FOR_BEAM_SEARCH = ("length_penalty", "early_stopping", "renormalize_logits")
"""Options without effect unless num_beams is above 1."""

_INSTEAD = {
    "max_length": "give max_new_tokens; max_length of the reference also counts the image and the prompt, "
    "or the start token of T5",
    "min_length": "give min_new_tokens; min_length of the reference also counts the image and the prompt, "
    "or the start token of T5",
    "logits_processor": "give it to the Request",
    "prefix_allowed_tokens_fn": "give a logits_processor to the Request",
    "stop_strings": "give stop",
    "stopping_criteria": "give stop",
    "eos_token_id": "end tokens are those of the checkpoint; give stop to end at a text",
    "force_words_ids": "constrained beam search is not supported",
    "num_beam_groups": "diverse beam search is not supported; set do_sample with num_beams for variety",
    "diversity_penalty": "diverse beam search is not supported; set do_sample with num_beams for variety",
    "penalty_alpha": "contrastive search is not supported",
}
"""Options that users of the reference look for, and what to do instead."""


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
    """Number of beams in beam search, which selects continuations at random with do_sample; 1 means greedy
    search, or sampling with do_sample."""
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
    min_p: float = _unset(0.0)
    """Sample only from tokens that have at least this fraction of the most likely token's probability."""
    typical_p: float = _unset(1.0)
    """Sample only from the most typical tokens that together reach this probability: those whose information
    is closest to the entropy."""
    num_return_sequences: int = _unset(1)
    """Number of texts per request: samples, or the best beams."""
    seed: int = _unset(0)
    """Seed of the random numbers of this request; other requests do not change them. Of several texts, each
    has the next seed."""
    stop: tuple[str, ...] = _unset(())
    """Texts that end generation; they are removed from the result."""
    suppress_tokens: tuple[int, ...] = _unset(())
    """Ids of tokens that are never generated."""
    bad_words_ids: tuple[tuple[int, ...], ...] = _unset(())
    """Sequences of token ids that are never generated; on the command line, ids are joined by commas."""
    renormalize_logits: bool = _unset(False)
    """Beam search adds log-probabilities that are normalized again after the logits processors."""

    def __new__(cls, **options: Any) -> GenerationOptions:
        """Refuse unknown options with a sentence; the generated `__init__` would only name them."""
        known = cls.__dataclass_fields__
        for name in options:
            if name not in known:
                raise TypeError(cls.explain_unknown(name))
        return super().__new__(cls)

    @classmethod
    def explain_unknown(cls, name: str) -> str:
        """Return the sentence that refuses an option of this name, which does not exist."""
        known = cls.__dataclass_fields__
        near = difflib.get_close_matches(name, [*known, "prompt"], n=1)  # which is given next to options
        hint = f"do you mean {near[0]}?" if near else f"the options are {', '.join(known)}"
        remedy = _INSTEAD.get(name, hint)
        return f"{name} is not an option; {remedy}"

    def __post_init__(self) -> None:
        if isinstance(self.stop, str | list):
            object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if isinstance(self.suppress_tokens, list | tuple):
            object.__setattr__(self, "suppress_tokens", tuple(map(_token_id, self.suppress_tokens)))
        if isinstance(self.bad_words_ids, list | tuple):
            object.__setattr__(self, "bad_words_ids", tuple(map(_token_ids, self.bad_words_ids)))
        require_types(self)
        if self.temperature == 0:
            object.__setattr__(self, "do_sample", False)
            for name in _FOR_SAMPLING:
                object.__setattr__(self, name, _default_of(name))
        self._check_ranges()
        self._check_combinations()

    def resolve(
        self,
        stored: Mapping[str, Any] = MappingProxyType({}),
        source: str = "the checkpoint's generation_config.json",
    ) -> GenerationOptions:
        """Return these options, with those that are not given from `stored` or from the defaults.

        As in transformers, a stored option without effect next to the given ones is left out, and a stored
        min_new_tokens ends at a given max_new_tokens.

        Args:
            stored: options by name, such as `ModelInfo.generation_config`.
            source: what messages call the place where `stored` is from.

        Raises:
            ValueError: the options contradict each other; the message names those that are stored.
        """
        if None not in vars(self).values():  # as for each request of a job
            return self
        missing = [option for option in fields(self) if getattr(self, option.name) is None]
        defaults = {option.name: option.metadata["resolved_default"] for option in missing}
        values = defaults | {name: stored[name] for name in defaults if stored.get(name) is not None}
        if not values.get("do_sample", self.do_sample):
            values |= {name: defaults[name] for name in _FOR_SAMPLING if name in defaults}
        if values.get("num_beams", self.num_beams) == 1:
            values |= {name: defaults[name] for name in _FOR_BEAM_SEARCH if name in defaults}
        if "min_new_tokens" in values and self.max_new_tokens is not None:
            values["min_new_tokens"] = min(values["min_new_tokens"], self.max_new_tokens)
        try:
            return replace(self, **values)
        except ValueError as error:
            found = [f"{name}={values[name]!r}" for name in defaults if values[name] != defaults[name]]
            named = [each for each in found if each.partition("=")[0] in str(error)]
            if not named or len(missing) == len(fields(self)):  # nothing is given
                raise
            raise ValueError(
                f"{error}; {' and '.join(named)} of {source} counts until another value is given"
            ) from error

    def require_known_tokens(self, vocab_size: int) -> None:
        """Check the token ids in these options against a model's vocabulary.

        Raises:
            ValueError: an id is not below `vocab_size`; the message names the option.
        """
        bad_ids = chain.from_iterable(self.bad_words_ids or ())
        for name, ids in (("suppress_tokens", self.suppress_tokens or ()), ("bad_words_ids", bad_ids)):
            largest = max(ids, default=0)
            _require(largest < vocab_size, name, f"token ids below {vocab_size}", largest)

    def _check_ranges(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            rule = f"at least {low}" if high == inf else f"from {low:g} to {high:g}"
            _require(value is None or low <= value <= high, name, rule, value)
        _require(self.seed is None or self.seed < 1 << 63, "seed", f"below {1 << 63}", self.seed)
        for name in ("top_p", "typical_p"):
            value = getattr(self, name)
            _require(value is None or 0 < value <= 1, name, "above 0 and at most 1", value)
        are_texts = all(isinstance(text, str) and text for text in self.stop or ())
        _require(are_texts, "stop", "texts that are not empty", self.stop)
        are_ids = min(self.suppress_tokens or (0,)) >= 0
        _require(are_ids, "suppress_tokens", "token ids from 0", self.suppress_tokens)
        are_sequences = all(ids and min(ids) >= 0 for ids in self.bad_words_ids or ())
        _require(
            are_sequences,
            "bad_words_ids",
            "sequences of token ids from 0, none of them empty",
            self.bad_words_ids,
        )

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
        if None in (self.num_beams, self.do_sample, self.num_return_sequences):
            return
        samples_texts = self.do_sample and self.num_beams == 1
        _require(
            samples_texts or self.num_return_sequences <= self.num_beams,
            "num_return_sequences",
            f"at most num_beams ({self.num_beams}) unless do_sample is set and num_beams is 1",
            f"{self.num_return_sequences}; raise num_beams, or set do_sample with num_beams 1"
            + ("" if self.do_sample else " and no temperature of 0"),
        )

    def _require_default(self, name: str, condition: str, remedy: str) -> None:
        default = _default_of(name)
        value = getattr(self, name)
        holds = value is None or value == default
        _require(holds, name, f"left at {default!r} {condition}", f"{value!r}; {remedy}")


def _token_id(given: Any) -> Any:
    """Return the number that a flag gives as text; anything else stays, and is checked later."""
    return int(given) if isinstance(given, str) and given.isdecimal() else given


def _token_ids(given: Any) -> Any:
    """Return a sequence of ids, which a flag gives as one text with commas."""
    ids = given.split(",") if isinstance(given, str) else given
    return tuple(map(_token_id, ids)) if isinstance(ids, list | tuple) else ids


def _default_of(name: str) -> Any:
    return GenerationOptions.__dataclass_fields__[name].metadata["resolved_default"]


def _require(holds: bool, field: str, rule: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{field} must be {rule}, got {got}")
