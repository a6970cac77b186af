"""Command-line flags from frozen dataclasses: a field is a flag, the docstring under it is its help.

Every default exists once, in the dataclass. A field whose type is a dataclass brings that one's
flags along, flat. An unknown flag is an error, and every error exits with status 1.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, Literal, NoReturn, TypeVar, Union

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """argparse, but errors exit with 1 (2 says that too many rows failed) and name the next best flag."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"{self.prog}: {message}\nSee {self.prog} --help\n")

    def refuse_unknown(self, unknown: Sequence[str], command: str) -> NoReturn:
        """End with the flag of a subcommand that is nearest to the first unknown argument."""
        flag = unknown[0].partition("=")[0]
        subparsers = next(a for a in self._actions if isinstance(a, argparse._SubParsersAction))
        near = difflib.get_close_matches(flag, subparsers.choices[command]._option_string_actions, 1)
        self.error(f"{command} has no argument {flag}" + (f"; did you mean {near[0]}?" if near else ""))


def add_flags(
    parser: argparse._ActionsContainer, cls: type, without: frozenset[str] = frozenset(), prefix: str = ""
) -> None:
    """Add a flag for each field of a dataclass, and of the dataclasses inside it."""
    hints = typing.get_type_hints(cls)
    help_of = field_docs(cls)
    for field in dataclasses.fields(cls):
        if field.name in without:
            continue
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            group = parser.add_argument_group(help_of[field.name])
            add_flags(group, typing.cast(type, hint), _hidden(field), _prefix(field))
            continue
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        help_text = help_of[field.name]
        if not required and hint is not bool and field.default not in (None, (), ""):
            help_text += f" (default: {_shown(field.default)})"
        parser.add_argument(
            flag_of(prefix + field.name),
            *(flag_of(prefix + old) for old in former_names(field)),
            dest=prefix + field.name,
            required=required,
            default=argparse.SUPPRESS,
            help=help_text.replace("%", "%%"),
            **_reading(hint, field.name) | _metavar_of(field),
        )


def build(cls: type[T], given: dict[str, Any], prefix: str = "") -> T:
    """An instance of a dataclass from parsed flags; fields not given keep their defaults."""
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(typing.cast(Any, cls)):
        if dataclasses.is_dataclass(hints[field.name]):
            values[field.name] = build(typing.cast(type, hints[field.name]), given, _prefix(field))
        elif prefix + field.name in given:
            value = given[prefix + field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def hiding(*names: str) -> dict[str, Any]:
    """Metadata for a field whose dataclass has fields that are no flags here."""
    return {"without": frozenset(names)}


def prefixed(prefix: str) -> dict[str, Any]:
    """Metadata for a field whose dataclass has names that would say too little on their own."""
    return {"prefix": f"{prefix}_"}


def formerly(*names: str) -> dict[str, Any]:
    """Metadata for a field that had other names: their flags and stored values are still read."""
    return {"former_names": names}


def former_names(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    """Names that a field had in earlier versions."""
    return field.metadata.get("former_names", ())


def written_as(metavar: str) -> dict[str, Any]:
    """Metadata for a field whose value has a form of its own, such as NAME=PROMPT."""
    return {"metavar": metavar}


def _metavar_of(field: dataclasses.Field[Any]) -> dict[str, Any]:
    return {"metavar": field.metadata["metavar"]} if "metavar" in field.metadata else {}


def _hidden(field: dataclasses.Field[Any]) -> frozenset[str]:
    return field.metadata.get("without", frozenset())


def _prefix(field: dataclasses.Field[Any]) -> str:
    return field.metadata.get("prefix", "")


@cache
def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field, inherited ones too, as one line."""
    docs = {name: text for base in reversed(cls.__mro__[1:-1]) for name, text in field_docs(base).items()}
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    for statement, after in pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            docs[statement.target.id] = " ".join(str(after.value.value).split())
    return docs


def _reading(hint: Any, name: str) -> dict[str, Any]:
    """How argparse reads a value of this type."""
    if hint is bool:
        return {"action": "store_true"}
    if typing.get_origin(hint) is tuple:
        return {"nargs": "+", "action": "extend", "type": str, "metavar": _metavar(name)}
    choices = _choices(hint)
    if choices:
        by_text = {str(choice).lower(): choice for choice in choices}
        return {"type": _choosing(by_text), "metavar": "{" + ",".join(by_text) + "}"}
    for kind in (int, float, str):
        if kind in (typing.get_args(hint) or (hint,)):
            return {"type": kind, "metavar": _metavar(name) if kind is str else kind.__name__.upper()}
    raise TypeError(f"{name} must be a bool, int, float, str, Literal or tuple to be a flag, got {hint}")


def _choices(hint: Any) -> list[Any]:
    """The allowed values of a Literal, a bool beside a Literal, or an optional one; else none."""
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    if typing.get_origin(hint) in (Union, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        if any(typing.get_origin(part) is Literal for part in parts):
            return [c for part in parts for c in ([True, False] if part is bool else _choices(part))]
    return []


def _shown(default: object) -> str:
    """As it is written on the command line."""
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return str(default).lower() if isinstance(default, bool) else str(default)


def _metavar(name: str) -> str:
    return name.rpartition("_")[2].upper()


def _choosing(by_text: Mapping[str, Any]) -> Callable[[str], Any]:
    def choose(text: str) -> Any:
        if text.lower() not in by_text:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(by_text)}, got {text}")
        return by_text[text.lower()]

    return choose
