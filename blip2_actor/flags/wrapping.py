"""Wrap a text for a terminal at its words, and never inside a command, which may be copied."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from typing import TextIO

PROGRAMS = frozenset({"blip2", "pip", "uv", "hf", "ray", "python", "curl", "kubectl", "apt-get"})
"""Programs whose names begin a command."""
ENDS = (",", ";", ":", ")", "?")
"""A word with one of these at its end is the last one of a command."""
MIN_COLUMNS = 20
"""Minimum width; narrower terminals have no room for words."""
_MARGIN = re.compile(r" *(?:\S+(?: \S+)? {2,})?")
"""What a line begins with, up to the text of its second column if there is one."""
_ARGUMENT = re.compile(r"""-|['"]|.*[/=\[{@<_\d].|.*\.\w|[A-Z][A-Z_]+\W*$""", re.DOTALL)
"""What an argument looks like, and a word of a sentence does not."""


def wrap_for(stream: TextIO, text: str) -> str:
    """Return a text whose lines fit a terminal, or the same text for a stream that is none.

    The lines of a command are not broken, and neither is a long word: the terminal breaks them, and gives
    them back whole when they are copied.
    """
    try:
        width = os.get_terminal_size(stream.fileno()).columns if stream.isatty() else 0
    except (OSError, ValueError):  # not a terminal of the system
        width = 0
    return text if width < MIN_COLUMNS else wrap(text, width - 1)


def wrap(text: str, width: int) -> str:
    """Return a text with lines of at most this width, as far as its words and commands allow."""
    return "\n".join(line for given in text.split("\n") for line in _wrapped(given, width))


def _wrapped(text: str, width: int) -> Iterator[str]:
    if _cells(text) <= width:
        yield text
        return
    margin = _MARGIN.match(text)
    assert margin is not None
    begin = margin[0]
    indent = " " * (len(begin) + 2 if begin in ("  ", "    ") else len(begin))
    if len(indent) > width // 3:
        indent = "  "
    line = begin
    for gap, unit in _units(text[len(begin) :]):
        if line.strip() and _cells(line + gap + unit) > width:
            yield line
            line = indent + unit
        else:
            line += gap + unit
    yield line


def _units(text: str) -> Iterator[tuple[str, str]]:
    """Yield what is not broken, each with the blanks before it: a word, or a whole command."""
    parts = re.split("( +)", text)
    words, gaps = parts[::2], ["", *parts[1::2]]
    at = 0
    while at < len(words):
        end = _end_of_command(words, at) if words[at] in PROGRAMS else at + 1
        unit = words[at] + "".join(gaps[one] + words[one] for one in range(at + 1, end))
        yield gaps[at], unit
        at = end


def _end_of_command(words: list[str], begin: int) -> int:
    """Return where a command ends: after its last argument, or after the word that follows the program."""
    end = min(begin + 2, len(words))
    is_quoted, takes_value = False, False
    for at in range(begin + 1, len(words)):
        word = words[at]
        if is_quoted or takes_value or _ARGUMENT.match(word):
            end = at + 1
        takes_value = word.startswith("-") and "=" not in word
        is_quoted ^= word.count("'") % 2 == 1
        if word.endswith(ENDS) and not is_quoted:
            break
    return end


def _cells(text: str) -> int:
    """Return how many columns of a terminal a text fills."""
    if text.isascii():
        return len(text)
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
