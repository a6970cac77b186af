"""The captions of drawn scenes: a grammar in which each scene has exactly one caption.

A scene is one object, or two objects in one of four arrangements, on a plain background. The caption names
the upper object first, or the left one if both are level: "a red circle above a blue square on a grey
background".

Each caption belongs to one split, by its pairs of color and shape and by a checksum of its text. So the
splits are disjoint by construction: training never draws a caption of `held_out`, and no pair of
`UNSEEN_PAIRS` occurs outside `unseen`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "orange": (245, 135, 20),
    "yellow": (250, 220, 45),
    "green": (40, 165, 60),
    "cyan": (50, 205, 225),
    "blue": (40, 85, 225),
    "purple": (135, 45, 175),
    "pink": (250, 135, 195),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (248, 248, 248),
    "grey": (128, 128, 128),
    "black": (12, 12, 12),
    "navy": (18, 24, 78),
    "beige": (226, 208, 172),
}
ARRANGEMENTS = ("above", "left of", "above and left of", "above and right of")
"""Position of the object that is named first, relative to the other one."""

UNSEEN_PAIRS = frozenset(
    {("red", "ring"), ("orange", "square"), ("green", "triangle"), ("blue", "cross"), ("purple", "circle")}
)
"""Pairs of color and shape that no object of any training scene has."""

HELD_OUT_PERCENT = 15
"""Percentage of the captions without unseen pairs that training never sees."""

Split = Literal["train", "held_out", "unseen"]
Thing = tuple[str, str]
"""Color and shape of one object."""


@dataclass(frozen=True)
class Caption:
    """What a scene shows; `str()` returns its only correct caption."""

    first: Thing
    background: str
    arrangement: str | None = None
    second: Thing | None = None

    def __post_init__(self) -> None:
        if (self.arrangement is None) != (self.second is None):
            raise ValueError("arrangement and second must be given together or not at all, got only one")

    @property
    def things(self) -> tuple[Thing, ...]:
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def split(self) -> Split:
        """The only split that this caption belongs to."""
        if any(thing in UNSEEN_PAIRS for thing in self.things):
            return "unseen"
        held_out = zlib.crc32(str(self).encode()) % 100 < HELD_OUT_PERCENT
        return "held_out" if held_out else "train"

    def __str__(self) -> str:
        objects = f" {self.arrangement} ".join(f"{_article(c)} {c} {s}" for c, s in self.things)
        return f"{objects} on {_article(self.background)} {self.background} background"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def all_captions() -> Iterator[Caption]:
    """Yield every caption of the grammar once."""
    things = list(product(COLORS, SHAPES))
    for background in BACKGROUNDS:
        for first in things:
            yield Caption(first, background)
            for arrangement, second in product(ARRANGEMENTS, things):
                yield Caption(first, background, arrangement, second)
