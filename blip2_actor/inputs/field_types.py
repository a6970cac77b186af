"""Check the types of a dataclass's fields, so that a text where a number belongs is an error at once.

A `Literal` is a type as well: its values are written once, in the field's annotation.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal

_NAMES = {int: "a whole number", float: "a number", str: "a text", type(None): "None"}
_PLAIN = {bool, int, float, str, type(None)}


class WrongType(TypeError, ValueError):
    """A field has a value of another type. It is a ValueError too, as are the other errors of a field."""


def require_types(instance: Any) -> None:
    """Raise `WrongType` for the first field whose value does not have its declared type.

    A whole number counts as a number; True and False are no numbers. Numbers and truth values of numpy count,
    and are replaced by those of Python, which JSON and random generators take. So are lists by tuples, and
    paths by texts.
    """
    cls: Any = type(instance)
    for name, hint in _hints(cls).items():
        value = getattr(instance, name)
        if value is None and cls.__dataclass_fields__[name].default is None:
            continue  # not given
        if not _fits(value, hint):
            raise WrongType(f"{name} must be {_described(hint)}, got {value!r} ({type(value).__name__})")
        if type(value) not in _PLAIN:
            object.__setattr__(instance, name, _plain(value))


def _plain(value: object) -> object:
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if _is_numpy_bool(value):
        return bool(value)
    if type(value) in _PLAIN or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


@cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _fits(value: object, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        return isinstance(value, tuple | list) and all(_fits(one, arguments[0]) for one in value)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if hint is bool and _is_numpy_bool(value):
        return True
    return isinstance(value, hint) or (hint is str and isinstance(value, os.PathLike))


def _is_numpy_bool(value: object) -> bool:
    """Tell it by its dtype: decode workers import this module, and no numpy."""
    return getattr(value, "ndim", None) == 0 and getattr(getattr(value, "dtype", None), "kind", None) == "b"


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
