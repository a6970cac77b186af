"""Command-line flags from frozen dataclasses: a field is a flag, the docstring under it is its help.

Every default exists once, in the dataclass. A field whose type is a dataclass adds the flags of that
dataclass to the same flat list. `blip2` and `python -m deploy` both take their flags from here.

A wrong command line exits with `WRONG_FLAGS` before anything is started. An unknown flag is reported with the
nearest known one, and before a missing flag: the misspelled flag usually is the missing one.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from itertools import pairwise
from typing import Any, Literal, NoReturn, TypeVar, Union

T = TypeVar("T")

WRONG_FLAGS = 3
"""Exit status of a command line that cannot be understood; `pipeline.exit_status` has the whole table."""

_OUR_WORDS = {
    r"^argument (-\S+): (must be|needs|takes)": r"\1 \2",
    r"^argument (-\S+): expected one argument$": r"\1 needs a value",
    r"^argument (-\S+): expected at least one argument$": r"\1 needs at least one value",
    r"^argument (-\S+): ignored explicit argument (.*)$": r"\1 takes no value, got \2",
}
"""Messages of argparse, as patterns, and ours for them."""

MIN_SIMILARITY = 0.5
"""A suggestion must share at least this much with what was typed (`difflib`: 0 is nothing, 1 is equal)."""
_OUR_FLAGS = {"--max-length": "--max-new-tokens", "--min-length": "--min-new-tokens"}
"""Flags that users of transformers type, and ours for the same purpose."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors exit with `WRONG_FLAGS` and suggest the nearest flag."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self._required: list[argparse.Action] = []  # what argparse takes for optional while it parses

    def error(self, message: str) -> NoReturn:
        for pattern, ours in _OUR_WORDS.items():
            message = re.sub(pattern, ours, message)
        self.exit(WRONG_FLAGS, f"{self.prog}: {message}\nSee {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all arguments; report an unknown flag before a missing one."""
        self._required = [action for action in self._actions if action.required]
        self._set_required(False)
        try:
            given, unknown = super().parse_known_args(args, namespace)
        finally:
            self._set_required(True)
        if unknown:
            self.refuse_unknown(unknown[0])
        missing = [_name_of(action) for action in self._required if getattr(given, action.dest, None) is None]
        if missing:
            self.error(f"{' and '.join(missing)} must be given")
        return given, unknown

    def print_help(self, file: Any = None) -> None:
        """Print help; `--help` does so in the middle of parsing, and must still show what is required."""
        self._set_required(True)
        super().print_help(file)

    def _set_required(self, required: bool) -> None:
        for action in self._required:
            action.required = required

    def refuse_unknown(self, argument: str) -> NoReturn:
        """Exit with the flag that is nearest to an unknown argument."""
        flag = argument.partition("=")[0]
        what = "flag" if flag.startswith("-") else "argument"
        self.error(f"there is no {what} {flag}{did_you_mean(flag, self._option_string_actions)}")


def _name_of(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else str(action.metavar)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of a sentence that names the nearest known word, or nothing when none is near."""
    near = difflib.get_close_matches(_OUR_FLAGS.get(word, word), list(known), 1, MIN_SIMILARITY)
    return f"; did you mean {near[0]}?" if near else ""


def add_flags(
    parser: argparse._ActionsContainer, cls: type, without: frozenset[str] = frozenset(), prefix: str = ""
) -> None:
    """Add a flag for each field of a dataclass, and of the dataclasses inside it.

    Args:
        without: names of fields that get no flag.
        prefix: begins the name of each flag.
    """
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
        default = field.metadata.get("resolved_default", field.default)
        help_text = with_flags(help_of[field.name], cls, prefix)
        if hint is not bool and default not in (None, (), "", dataclasses.MISSING):
            help_text += f" (default: {_shown(default)})"
        names = [flag_of(prefix + name) for name in (field.name, *former_names(field))]
        place: dict[str, Any] = {"dest": prefix + field.name, "required": default is dataclasses.MISSING}
        is_positional = "positional" in field.metadata
        parser.add_argument(
            *([field.name] if is_positional else names),
            **({} if is_positional else place),
            default=argparse.SUPPRESS,
            help=help_text.replace("%", "%%"),
            **_value_options(hint, field) | {k: v for k, v in field.metadata.items() if k == "metavar"},
        )


def build(cls: type[T], given: Mapping[str, Any], prefix: str = "") -> T:
    """Return an instance of a dataclass from parsed flags; fields that are not given keep their defaults.

    Raises:
        ValueError: values contradict each other, or one is out of range; the message names flags.
    """
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(typing.cast(Any, cls)):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            values[field.name] = build(typing.cast(type, hint), given, _prefix(field))
        elif prefix + field.name in given:
            value = given[prefix + field.name]
            values[field.name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(with_flags(str(error), cls, prefix)) from None


def with_flags(text: str, cls: type, prefix: str = "") -> str:
    """Replace the names of a dataclass's fields in a text by the names of their flags.

    A name of one word is also an English word: it is replaced only in front of "must". Paths and quoted
    values stay as they are.
    """
    for name, flag in _flags_of(cls, prefix).items():
        pattern = rf"(?<![-\w/.'\"]){name}(?![-\w/'\"]|\.\w)" if "_" in name else rf"^{name}(?= must\b)"
        text = re.sub(pattern, flag, text)
    return text


def _flags_of(cls: type, prefix: str = "") -> dict[str, str]:
    """Return the flag of each field of a dataclass, and of the dataclasses inside it."""
    hints = typing.get_type_hints(cls)
    flags: dict[str, str] = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            inside = _flags_of(typing.cast(type, hints[field.name]), _prefix(field))
            flags |= {name: flag for name, flag in inside.items() if name not in _hidden(field)}
        else:
            flags[field.name] = field.metadata.get("positional", flag_of(prefix + field.name))
    return flags


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


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


def written_as(metavar: str, positional: bool = False) -> dict[str, Any]:
    """Return metadata for a value with a form of its own, such as NAME=PROMPT, or one without a flag."""
    return {"metavar": metavar} | ({"positional": metavar} if positional else {})


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


def _value_options(hint: Any, field: dataclasses.Field[Any]) -> dict[str, Any]:
    """Return the options with which argparse reads a value of this type; --no-… is for what can be None."""
    metavar = field.name.rpartition("_")[2].upper()
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction if field.default is None else "store_true"}
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
            return {"type": _number_reader(kind), "metavar": kind.__name__.upper()}
    raise TypeError(f"{field.name} must be bool, int, float, str, Literal or tuple to be a flag, got {hint}")


def _choices(hint: Any) -> list[Any]:
    """Return the allowed values of a Literal, alone or in a union with bool or None; else nothing."""
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    if typing.get_origin(hint) in (Union, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        if any(typing.get_origin(part) is Literal for part in parts):
            return [c for part in parts for c in ([True, False] if part is bool else _choices(part))]
    return []


def _shown(default: object) -> str:
    """Return a default as it is written on the command line."""
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return str(default).lower() if isinstance(default, bool) else str(default)


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
