"""Flags from the fields of a dataclass, and the dataclass from what the flags say."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

from blip2_actor.flags.parser import Parser
from blip2_actor.flags.values import shown, value_options

T = TypeVar("T")
SHORT = {"output": "-o", "model": "-m"}
"""Flags with a letter, which means the same in every command."""


def add_flags(
    parser: argparse._ActionsContainer, cls: type, without: frozenset[str] = frozenset(), prefix: str = ""
) -> None:
    """Add a flag for each field of a dataclass, and of the dataclasses inside it.

    Args:
        without: names of fields that get no flag.
        prefix: prefix of each flag's name.
    """
    help_of = field_docs(cls)
    for field, hint in _fields(cls, without):
        if dataclasses.is_dataclass(hint):
            group = parser.add_argument_group(help_of[field.name])
            add_flags(group, typing.cast(type, hint), _hidden(field), _prefix(field))
            continue
        default = default_of(field)
        help_text = with_flags(help_of[field.name], cls, prefix)
        if hint is not bool and default not in (None, (), ""):
            help_text += f" (default: {shown(default)})"
        action = parser.add_argument(
            *([SHORT[field.name]] if field.name in SHORT and not prefix else []),
            flag_of(prefix + field.name),
            *(flag_of(prefix + old) for old in former_names(field)),
            dest=prefix + field.name,
            required=field.default is dataclasses.MISSING,
            default=argparse.SUPPRESS,
            help=help_text.replace("%", "%%"),
            **value_options(hint, field),
        )
        if field.metadata.get("positional") and isinstance(parser, Parser):
            parser.positionals.append(action)


def build(cls: type[T], given: Mapping[str, Any], prefix: str = "") -> T:
    """Return an instance of a dataclass from parsed flags; fields that are not given keep their defaults.

    Raises:
        ValueError: values contradict each other, or one is out of range; the message names flags.
    """
    values: dict[str, Any] = {}
    for field, hint in _fields(cls):
        if dataclasses.is_dataclass(hint):
            values[field.name] = build(typing.cast(type, hint), given, _prefix(field))
        elif prefix + field.name in given:
            value = given[prefix + field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(with_flags(str(error), cls, prefix)) from None


def flag_fields(
    cls: type, prefix: str = "", without: frozenset[str] = frozenset()
) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yield each field with a flag, inner dataclasses included, with its name as `build` takes it."""
    for field, hint in _fields(cls, without):
        if dataclasses.is_dataclass(hint):
            yield from flag_fields(typing.cast(type, hint), _prefix(field), _hidden(field))
        else:
            yield prefix + field.name, field


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return the default of a flag; None for a required one too."""
    default = field.metadata.get("resolved_default", field.default)
    return None if default is dataclasses.MISSING else default


def with_flags(text: str, cls: type, prefix: str = "") -> str:
    """Replace the names of a dataclass's fields in a text by the names of their flags.

    A name of one word is also an English word: it is replaced only at the beginning before "must", and after
    "with" or "without" at the end of a clause. Paths and quoted values stay as they are.
    """
    flags = {field.name: flag_of(name) for name, field in flag_fields(cls, prefix)}
    for name, flag in flags.items():
        if "_" in name:
            text = re.sub(rf"(?<![-\w/.'\"]){name}(?![-\w/'\"]|\.\w)", flag, text)
        else:
            text = re.sub(rf"^{name}(?= must\b)", flag, text)
            text = re.sub(rf"(?<=\bwith |hout ){name}(?=[,;]|$)", flag, text)
    return text


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def without_flag() -> dict[str, Any]:
    """Return metadata for a field that only programs set."""
    return {"has_flag": False}


def hiding(*names: str) -> dict[str, Any]:
    """Return metadata for a field of a dataclass type: these fields of it get no flags."""
    return {"without": frozenset(names)}


def prefixed(prefix: str) -> dict[str, Any]:
    """Return metadata for a field of a dataclass type: this word begins the names of its flags."""
    return {"prefix": f"{prefix}_"}


def formerly(*names: str) -> dict[str, Any]:
    """Return metadata for a renamed field: flags and stored values under the old names are still read."""
    return {"former_names": names}


def former_names(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    """Return the names that a field had in earlier versions."""
    return field.metadata.get("former_names", ())


def with_current_names(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stored values of a dataclass, renamed as its fields have been; unknown names stay."""
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)
    renamed = {old: field.name for field in fields for old in former_names(field)}
    current = {renamed.get(name, name): value for name, value in values.items()}
    return {
        name: with_current_names(hints[name], value)
        if isinstance(value, Mapping) and dataclasses.is_dataclass(hints.get(name))
        else value
        for name, value in current.items()
    }


def written_as(metavar: str) -> dict[str, Any]:
    """Return metadata for a field whose value has a form of its own, such as NAME=PROMPT."""
    return {"metavar": metavar}


def positional() -> dict[str, Any]:
    """Return metadata for a field whose flag may be left out, because its values may be positional."""
    return {"positional": True}


def _fields(cls: type, without: frozenset[str] = frozenset()) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """Yield the fields that are not left to programs, each with its type."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(typing.cast(Any, cls)):
        if field.metadata.get("has_flag", True) and field.name not in without:
            yield field, hints[field.name]


def _hidden(field: dataclasses.Field[Any]) -> frozenset[str]:
    return field.metadata.get("without", frozenset())


def _prefix(field: dataclasses.Field[Any]) -> str:
    return field.metadata.get("prefix", "")


@cache
def field_docs(cls: type) -> dict[str, str]:
    """Return the docstring under each field, inherited fields included, as one line each."""
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
