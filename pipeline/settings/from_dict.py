"""`from_dict`: settings from the plain values that a run has stored."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from blip2_actor.flags import with_current_names

T = TypeVar("T")


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build a frozen dataclass, and the dataclasses inside it, from plain values.

    A field that has been renamed is also found by its former names.

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
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value)
    return tuple(value) if isinstance(value, list) else value
