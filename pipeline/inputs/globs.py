"""Braces and globs in input names: `{00000..01023}.tar`, `{train,val}/**/*.tar`. Text in, text out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_braces(text: str) -> list[str]:
    """Write out every `{a,b}` and `{007..123}`, in order; other braces stay as they are."""
    for braces in _BRACES.finditer(text):
        before, after = text[: braces.start()], text[braces.end() :]
        if alternatives := _alternatives(braces[1]):
            written = (expand_braces(f"{before}{alternative}{after}") for alternative in alternatives)
            return list(dict.fromkeys(itertools.chain.from_iterable(written)))
    return [text]


def _alternatives(inside: str) -> list[str]:
    found = _RANGE.fullmatch(inside)
    if found is None:
        return inside.split(",") if "," in inside else []
    first, last = int(found[1]), int(found[2])
    padded = any(text.startswith("0") and len(text) > 1 for text in found.groups())
    width = max(map(len, found.groups())) if padded else 0
    step = 1 if first <= last else -1
    return [f"{number:0{width}}" for number in range(first, last + step, step)]


def is_glob(text: str) -> bool:
    return any(character in text for character in "*?[")


def matches(path: Sequence[str], pattern: Sequence[str], *, beginning: bool = False) -> bool:
    """Whether the parts of a path match those of a glob, in which `**` stands for any number of folders.

    Args:
        path: the path's parts.
        pattern: the pattern's parts.
        beginning: ask instead whether something below this path could match.
    """
    if not pattern:
        return not path
    if pattern[0] == "**":
        below = bool(path) and matches(path[1:], pattern, beginning=beginning)
        return below or matches(path, pattern[1:], beginning=beginning)
    if not path:
        return beginning
    return fnmatchcase(path[0], pattern[0]) and matches(path[1:], pattern[1:], beginning=beginning)
