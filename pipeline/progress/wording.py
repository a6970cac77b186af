"""Numbers, durations and sizes as messages say them."""

from __future__ import annotations

import re
from itertools import pairwise

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Characters that move the cursor, change colors, or reverse the direction of a text in a terminal."""


def escaped(text: str, keep: str = "") -> str:
    """Return a text with its control characters as in JSON: names, captions and errors are untrusted.

    Args:
        keep: characters that stay as they are.
    """
    return _CONTROL.sub(lambda match: match[0] if match[0] in keep else f"\\u{ord(match[0]):04x}", text)


def cut(text: str, max_chars: int) -> str:
    """Return a text that is at most so long, with an ellipsis if it was longer."""
    return text if len(text) <= max_chars else text[: max(0, max_chars - 1)] + "…"


def count(number: int, noun: str) -> str:
    """Return a number with its noun: 1 shard, 2,000 shards."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def duration(seconds: float | None) -> str:
    """Return a duration in at most two units: 3 d 4 h, 5 min 6 s, 0.2 s."""
    if seconds is None:
        return "unknown"
    if 0.05 <= seconds < 0.95:
        return f"{seconds:.1f} s"
    seconds = int(seconds + 0.5)
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for (big, big_s), (small, small_s) in pairwise(units):
        if seconds >= big_s:
            rest = seconds % big_s // small_s
            return f"{seconds // big_s} {big} {rest} {small}" if rest else f"{seconds // big_s} {big}"
    return f"{seconds} s"


def format_bytes(num_bytes: float) -> str:
    """Format a number of bytes with three digits, in powers of 1000."""
    if num_bytes < 999.5:
        return count(round(num_bytes), "byte")
    for unit in ("kB", "MB", "GB", "TB"):
        num_bytes /= 1000
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
    return f"{num_bytes:,.0f} TB"
