"""The edit distance of two texts in words, and where they differ."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Sequence


def edit_distance(before: Sequence[str], after: Sequence[str]) -> int:
    """Return the smallest number of words to insert, delete or replace.

    The bit-parallel algorithm of Hyyrö (2003), after Myers (1999): a column of the table is one number.
    """
    if not before or not after:
        return len(before) or len(after)
    positions: dict[str, int] = defaultdict(int)
    for index, word in enumerate(before):
        positions[word] |= 1 << index
    everything, last = (1 << len(before)) - 1, 1 << (len(before) - 1)
    above, below, distance = everything, 0, len(before)
    for word in after:
        match = positions.get(word, 0)
        zero = (((match & above) + above) ^ above) | match | below
        more = below | ~(zero | above)
        less = zero & above
        distance += bool(more & last) - bool(less & last)
        more = (more << 1) | 1
        above = ((less << 1) | ~(zero | more)) & everything
        below = zero & more & everything
    return distance


def diff(
    before: Sequence[str], after: Sequence[str]
) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Return both texts in pieces: (words with blanks between, whether the other text lacks them)."""
    left: list[tuple[str, bool]] = []
    right: list[tuple[str, bool]] = []
    matcher = difflib.SequenceMatcher(a=before, b=after, autojunk=False)
    for kind, a0, a1, b0, b1 in matcher.get_opcodes():
        for side, words in ((left, before[a0:a1]), (right, after[b0:b1])):
            if words:
                side.append((" ".join(words), kind != "equal"))
    return left, right
