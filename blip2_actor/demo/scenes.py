"""Drawn scenes, each with exactly one canonical caption, so that a caption can be checked.

A scene is one object, or two objects in one of four arrangements, on a plain background. The caption
names the upper object first, and the left one where both stand in one row: "a red circle above a blue
square on a grey background". NumPy and Pillow only.

Captions are split by a checksum of their text and by their pairs, so the splits are disjoint by
construction: no caption of `held_out` is ever drawn for training, and no pair of `UNSEEN_PAIRS` occurs
outside `unseen`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
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
"""Where the object that is named first stands, seen from the other one."""

UNSEEN_PAIRS = frozenset(
    {("red", "ring"), ("orange", "square"), ("green", "triangle"), ("blue", "cross"), ("purple", "circle")}
)
"""Colour and shape that never meet in training, in no object of any scene."""

HELD_OUT_PERCENT = 15
"""Share of captions of seen pairs that training never sees."""

Split = Literal["train", "held_out", "unseen"]
Thing = tuple[str, str]
"""Colour and shape of one object."""


@dataclass(frozen=True)
class Caption:
    """What a scene shows; `str()` is its one canonical caption."""

    first: Thing
    background: str
    arrangement: str | None = None
    second: Thing | None = None

    def __post_init__(self) -> None:
        if (self.arrangement is None) != (self.second is None):
            raise ValueError("arrangement must be given with the second object and only with it")

    @property
    def things(self) -> tuple[Thing, ...]:
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def split(self) -> Split:
        """The one split this caption belongs to."""
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
    """Every caption of the grammar, each once."""
    things = list(product(COLOURS, SHAPES))
    for background in BACKGROUNDS:
        for first in things:
            yield Caption(first, background)
            for arrangement, second in product(ARRANGEMENTS, things):
                yield Caption(first, background, arrangement, second)


@dataclass(frozen=True, eq=False)
class Scenes:
    """N captions with a place for every object; lengths are fractions of the image's side.

    `centres` is float[N, 2, 2] as (x, y), `sizes` float[N, 2]; a missing second object has size 0.
    """

    captions: tuple[Caption, ...]
    centres: np.ndarray
    sizes: np.ndarray
    tints: np.ndarray
    """float[N, 3, 3]: added to the RGB of background, first and second object."""

    def __len__(self) -> int:
        return len(self.captions)

    def slice(self, start: int, stop: int) -> Scenes:
        return Scenes(
            self.captions[start:stop],
            self.centres[start:stop],
            self.sizes[start:stop],
            self.tints[start:stop],
        )


class SceneSampler:
    """Draws scenes of one split: captions, then places; the same seed gives the same scenes."""

    def __init__(self, split: Split, seed: int, *, two_objects: float = 0.85) -> None:
        captions = [c for c in all_captions() if c.split == split]
        self._singles = [c for c in captions if c.second is None]
        self._pairs = [c for c in captions if c.second is not None]
        self._two_objects = two_objects
        self._rng = np.random.default_rng(seed)

    def sample(self, num_scenes: int) -> Scenes:
        """Draw scenes whose objects lie wholly inside the image and never touch."""
        rng = self._rng
        is_pair = rng.random(num_scenes) < self._two_objects
        singles = rng.integers(len(self._singles), size=num_scenes)
        pairs = rng.integers(len(self._pairs), size=num_scenes)
        captions = tuple(
            self._pairs[p] if two else self._singles[s]
            for two, s, p in zip(is_pair, singles, pairs, strict=True)
        )
        sizes = rng.uniform(0.34, 0.44, (num_scenes, 2))
        sizes[~is_pair, 0] = rng.uniform(0.34, 0.62, num_scenes)[~is_pair]
        sizes[~is_pair, 1] = 0.0
        return Scenes(captions, self._place(captions, sizes), sizes, rng.normal(0, 4, (num_scenes, 3, 3)))

    def _place(self, captions: tuple[Caption, ...], sizes: np.ndarray) -> np.ndarray:
        """Centres float[N, 2, 2]: apart along the arrangement's axes, nearly level along the other."""
        num_scenes = len(captions)
        edge = 0.02
        apart = np.empty((num_scenes, 2, 2))
        # Along an axis on which the two stand apart, the room left is shared out before, between and after.
        room = 1 - 2 * edge - sizes.sum(1) - 0.04
        cuts = np.sort(self._rng.random((num_scenes, 2, 2)), axis=1) * room[:, None, None]
        apart[:, 0] = edge + cuts[:, 0] + sizes[:, :1] / 2
        apart[:, 1] = edge + cuts[:, 1] + 0.04 + sizes[:, :1] + sizes[:, 1:] / 2
        # Along the other axis both stand around one line.
        widest = sizes.max(1)[:, None] / 2 + edge
        line = widest + self._rng.random((num_scenes, 2)) * (1 - 2 * widest)
        level = line[:, None, :] + self._rng.uniform(-0.06, 0.06, (num_scenes, 2, 2))
        level = np.clip(level, sizes[:, :, None] / 2 + edge, 1 - sizes[:, :, None] / 2 - edge)

        arrangements = np.array([c.arrangement or "" for c in captions])
        is_apart = (
            np.stack([arrangements != "above", arrangements != "left of"], axis=1)
            & (arrangements != "")[:, None]
        )
        centres = np.where(is_apart[:, None, :], apart, level)
        mirrored = arrangements == "above and right of"
        centres[mirrored, :, 0] = 1 - centres[mirrored, :, 0]
        return centres


def draw(scenes: Scenes, side_px: int) -> np.ndarray:
    """Draw scenes with smooth edges.

    Returns:
        uint8[N, side_px, side_px, 3] in RGB.
    """
    grounds = [BACKGROUNDS[caption.background] for caption in scenes.captions] + scenes.tints[:, 0]
    images = np.empty((len(scenes), side_px, side_px, 3), np.uint8)
    images[:] = np.clip(grounds, 0, 255)[:, None, None, :]
    for index, caption in enumerate(scenes.captions):
        for slot, (colour, shape) in enumerate(caption.things):
            rgb = np.clip(COLOURS[colour] + scenes.tints[index, slot + 1], 0, 255)
            _draw_object(images[index], shape, rgb, scenes.centres[index, slot], scenes.sizes[index, slot])
    return images


def _draw_object(image: np.ndarray, shape: str, rgb: np.ndarray, centre: np.ndarray, size: float) -> None:
    """Blend one object into uint8[S, S, 3]."""
    half_px = size * len(image) / 2
    centre_px = centre * len(image)
    left, top = np.maximum(np.floor(centre_px - half_px - 1), 0).astype(int)
    right, bottom = np.ceil(centre_px + half_px + 1).astype(int)
    window = image[top:bottom, left:right]
    u = (np.arange(left, left + window.shape[1], dtype=np.float32) + 0.5 - centre_px[0]) / half_px
    v = (np.arange(top, top + window.shape[0], dtype=np.float32) + 0.5 - centre_px[1]) / half_px
    distance_px = _distance(shape, u[None, :], v[:, None]) * half_px
    cover = np.clip(0.5 - distance_px, 0, 1).astype(np.float32)[..., None]
    window[:] = window + cover * (rgb.astype(np.float32) - window) + 0.5


def _distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Distance to the outline, negative inside, of a shape that fills u, v in [-1, 1] (v downwards)."""
    if shape == "circle":
        return np.hypot(u, v) - 1
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.75) - 0.25
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.9
    if shape == "triangle":
        return np.maximum(v - 0.9, (1.9 * np.abs(u) - (v + 1)) / np.float32(np.hypot(1.9, 1)))
    if shape == "cross":
        upright = np.maximum(np.abs(u) - 0.33, np.abs(v) - 1)
        level = np.maximum(np.abs(u) - 1, np.abs(v) - 0.33)
        return np.minimum(upright, level)
    raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
