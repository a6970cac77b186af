"""How argparse reads the value of a field: by its type."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union


class Switch(argparse.Action):
    """A flag without a value, and its opposite --no-..., which overrules a configuration file.

    Args:
        shows_opposite: help shows both, because what is not given is neither.
    """

    def __init__(self, option_strings: Sequence[str], shows_opposite: bool, **settings: Any) -> None:
        self.positive = tuple(option_strings)
        self.shows_opposite = shows_opposite
        opposites = [f"--no-{name.removeprefix('--')}" for name in option_strings]
        super().__init__([*option_strings, *opposites], nargs=0, **settings)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, option_string in self.positive)


def value_options(hint: Any, field: dataclasses.Field[Any]) -> dict[str, Any]:
    """Return the options with which argparse reads a value of this type."""
    if hint is bool:
        return {"action": Switch, "shows_opposite": field.default is None}
    metavar = field.metadata.get("metavar", field.name.rpartition("_")[2].upper())
    if typing.get_origin(hint) is tuple:
        return {"nargs": "+", "action": "extend", "type": str, "metavar": metavar}
    choices = _choices(hint)
    if choices:
        by_text = {str(choice).lower(): choice for choice in choices}
        return {"type": _choice_reader(by_text), "metavar": "{" + ",".join(by_text) + "}"}
    for kind in (int, float, str):
        if kind in (typing.get_args(hint) or (hint,)):
            if kind is str:
                return {"type": str, "metavar": metavar}
            return {
                "type": _number_reader(kind),
                "metavar": field.metadata.get("metavar", kind.__name__.upper()),
            }
    raise TypeError(f"{field.name} must be bool, int, float, str, Literal or tuple to be a flag, got {hint}")


def shown(default: object) -> str:
    """Return a default as it is written on the command line."""
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return str(default).lower() if isinstance(default, bool) else str(default)


def _choices(hint: Any) -> list[Any]:
    """Return the allowed values of a Literal, alone or in a union with bool or None; else nothing."""
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    if typing.get_origin(hint) in (Union, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        if any(typing.get_origin(part) is Literal for part in parts):
            return [c for part in parts for c in ([True, False] if part is bool else _choices(part))]
    return []


def _number_reader(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a {what}, got {text}") from None

    return read


def _choice_reader(by_text: Mapping[str, Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if text.lower() not in by_text:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(by_text)}, got {text}")
        return by_text[text.lower()]

    return read
