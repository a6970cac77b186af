"""`to_dict` and `from_dict`: settings to the plain values that a run stores, and back.

The stored names never change, so that every version can read them: a field that has been renamed is stored
under its first name, and one that is newer than version 0.1.0 only if it is set.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from blip2_actor.flags import former_names, with_current_names

T = TypeVar("T")
NEWER_FIELDS = frozenset(
    {
        "accelerator",
        "accelerator_type",
        "accept_truncated",
        "adapter",
        "allow_urls",
        "bad_words_ids",
        "calibration",
        "caption_label",
        "decode_label",
        "exclude",
        "fetch",
        "fetching",
        "ignore_generation_config",
        "image_encoding",
        "image_size_px",
        "include",
        "max_flagged_fraction",
        "min_confidence",
        "min_p",
        "quantization_choice",
        "quantize",
        "read_label",
        "renormalize_logits",
        "step_timeout_s",
        "suppress_tokens",
        "typical_p",
    }
)
"""Fields that version 0.1.0 does not know."""


def to_dict(settings: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, and of the dataclasses inside it, by their stored names."""
    values = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in NEWER_FIELDS and value == field.default:
            continue
        stored_name = next(iter(former_names(field)), field.name)
        values[stored_name] = to_dict(value) if dataclasses.is_dataclass(value) else value
    return values


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build a frozen dataclass, and the dataclasses inside it, from plain values.

    A field that has been renamed is found by its former names too.

    Raises:
        ValueError: a name is unknown.
    """
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    values = with_current_names(cls, values)
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"settings must be those of this version, got unknown {', '.join(unknown)}")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _read(hints[name], value) for name, value in values.items()})


def _read(hint: Any, value: Any) -> Any:
    for one in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(one) and value is not None:
            return from_dict(typing.cast(type, one), value)
    return tuple(value) if isinstance(value, list) else value
