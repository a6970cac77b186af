"""Check the types of a dataclass's fields, so that a text where a number belongs is an error at once.

A `Literal` is a type as well: its values are written once, in the field's annotation.
"""

from __future__ import annotations

import types
import typing
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal

_NAMES = {int: "a whole number", float: "a number", str: "a text", type(None): "None"}


class WrongType(TypeError, ValueError):
    """A field has a value of another type. It is a ValueError too, as are the other errors of a field."""


def require_types(instance: Any) -> None:
    """Raise `WrongType` for the first field whose value does not have its declared type.

    A whole number counts as a number, and numbers of numpy count; True and False are no numbers.
    """
    cls: Any = type(instance)
    for name, hint in _hints(cls).items():
        value = getattr(instance, name)
        if value is None and cls.__dataclass_fields__[name].default is None:
            continue  # not given
        if not _fits(value, hint):
            raise WrongType(f"{name} must be {_described(hint)}, got {value!r} ({type(value).__name__})")


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _fits(value: object, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(one, arguments[0]) for one in value)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, hint)


def _described(hint: Any) -> str:
    *others, last = _alternatives(hint)
    return f"{', '.join(others)} or {last}" if others else last


def _alternatives(hint: Any) -> list[str]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return [name for one in arguments for name in _alternatives(one)]
    if origin is Literal:
        return [repr(value) for value in arguments]
    if origin is tuple:
        return [{str: "texts", int: "whole numbers"}.get(arguments[0], "sequences of whole numbers")]
    if hint is bool:
        return ["true", "false"]
    return [_NAMES.get(hint, getattr(hint, "__name__", str(hint)))]
