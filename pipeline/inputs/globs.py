"""Braces and globs in input names: `{00000..01023}.tar`, `{train,val}/**/*.tar`.

This module works on text alone and reads no folder. Braces and globs mean what they mean in a shell.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+|[a-zA-Z])\.\.(-?\d+|[a-zA-Z])(?:\.\.(-?\d+))?")


@dataclass(frozen=True)
class Patterns:
    """Which files of an input are wanted, by globs over their paths below the input."""

    include: Sequence[str] = ()
    """A file must match one of these, if there are any."""
    exclude: Sequence[str] = ()
    """A file that matches one of these is left out."""

    def take(self, path: str) -> bool:
        """Return whether a file is wanted."""
        is_included = not self.include or any(_names(pattern, path) for pattern in self.include)
        return is_included and not any(_names(pattern, path) for pattern in self.exclude)


def _names(pattern: str, path: str) -> bool:
    """Whether a glob matches a path: the whole path if the glob has a slash, else the name of the file."""
    parts = path.split("/")
    return matches(parts, pattern.split("/")) if "/" in pattern else fnmatchcase(parts[-1], pattern)


def expand_braces(text: str) -> list[str]:
    """Write out every `{a,b}`, `{007..123}`, `{a..f}` and `{0..10..2}`, in order. Other braces stay."""
    for braces in _BRACES.finditer(text):
        before, after = text[: braces.start()], text[braces.end() :]
        if alternatives := _alternatives(braces[1]):
            expanded = (expand_braces(f"{before}{alternative}{after}") for alternative in alternatives)
            return list(dict.fromkeys(itertools.chain.from_iterable(expanded)))
    return [text]


def _alternatives(inside: str) -> list[str]:
    """Return what a pair of braces stands for; nothing if it is neither a range nor a list."""
    found = _RANGE.fullmatch(inside)
    if found is None:
        return inside.split(",") if "," in inside else []
    ends = (found[1], found[2])
    are_letters = [text.isalpha() for text in ends]
    if any(are_letters) and not all(are_letters):
        return []
    first, last = map(ord if all(are_letters) else int, ends)
    step = abs(int(found[3] or 1)) or 1
    numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    if all(are_letters):
        return [chr(number) for number in numbers]
    is_padded = any(re.match(r"-?0\d", text) for text in ends)
    width = max(map(len, ends)) if is_padded else 0
    return [f"{number:0{width}}" for number in numbers]


def is_glob(text: str) -> bool:
    return any(character in text for character in "*?[")


def matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path match the parts of a glob; `**` stands for any number of folders.

    At the end it stands for what is below a folder, and not for the folder, which may be a file.
    """
    if not pattern:
        return not path
    if list(pattern) == ["**"]:
        return bool(path)
    if pattern[0] == "**":
        return matches(path, pattern[1:]) or (bool(path) and matches(path[1:], pattern))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and matches(path[1:], pattern[1:])


def may_match_below(folder: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether something below a folder, given as its parts, could match the parts of a glob."""
    if not folder:
        return bool(pattern)
    if not pattern:
        return False
    if pattern[0] == "**":
        return may_match_below(folder, pattern[1:]) or may_match_below(folder[1:], pattern)
    return fnmatchcase(folder[0], pattern[0]) and may_match_below(folder[1:], pattern[1:])
