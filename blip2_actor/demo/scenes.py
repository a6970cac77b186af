"""Drawn scenes: where the objects of a caption are, and what they look like. Needs NumPy only.

The caption of a scene is its only correct caption (`grammar`), so a caption can be checked word for word.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from blip2_actor.demo.grammar import BACKGROUNDS, COLORS, SHAPES, Caption, Split, all_captions


@dataclass(frozen=True, eq=False)
class Scenes:
    """N captions with a position for every object; lengths are fractions of the image's side."""

    captions: tuple[Caption, ...]
    centers: np.ndarray
    """float[N, 2, 2]: (x, y) of each object."""
    sizes: np.ndarray
    """float[N, 2]: side of each object; 0 if there is no second object."""
    tints: np.ndarray
    """float[N, 3, 3]: added to the RGB of the background, the first object and the second object."""

    def __len__(self) -> int:
        return len(self.captions)

    def slice(self, start: int, stop: int) -> Scenes:
        return Scenes(
            self.captions[start:stop],
            self.centers[start:stop],
            self.sizes[start:stop],
            self.tints[start:stop],
        )


class SceneSampler:
    """Draws random scenes of one split; equal seeds give equal scenes."""

    def __init__(self, split: Split, seed: int, *, two_objects: float = 0.85) -> None:
        captions = [c for c in all_captions() if c.split == split]
        self._singles = [c for c in captions if c.second is None]
        self._pairs = [c for c in captions if c.second is not None]
        self._two_objects = two_objects
        self._rng = np.random.default_rng(seed)

    def sample(self, num_scenes: int) -> Scenes:
        """Draw scenes whose objects are completely inside the image and never touch."""
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
        """Return centers, float[N, 2, 2]: apart along the arrangement's axes, nearly level along the
        other."""
        num_scenes = len(captions)
        edge = 0.02
        apart = np.empty((num_scenes, 2, 2))
        # On an axis on which the objects are apart, free space is divided: before, between and after them.
        free = 1 - 2 * edge - sizes.sum(1) - 0.04
        cuts = np.sort(self._rng.random((num_scenes, 2, 2)), axis=1) * free[:, None, None]
        apart[:, 0] = edge + cuts[:, 0] + sizes[:, :1] / 2
        apart[:, 1] = edge + cuts[:, 1] + 0.04 + sizes[:, :1] + sizes[:, 1:] / 2
        # On the other axis both objects are near one line.
        widest = sizes.max(1)[:, None] / 2 + edge
        line = widest + self._rng.random((num_scenes, 2)) * (1 - 2 * widest)
        level = line[:, None, :] + self._rng.uniform(-0.06, 0.06, (num_scenes, 2, 2))
        level = np.clip(level, sizes[:, :, None] / 2 + edge, 1 - sizes[:, :, None] / 2 - edge)

        arrangements = np.array([c.arrangement or "" for c in captions])
        is_apart = (
            np.stack([arrangements != "above", arrangements != "left of"], axis=1)
            & (arrangements != "")[:, None]
        )
        centers = np.where(is_apart[:, None, :], apart, level)
        mirrored = arrangements == "above and right of"
        centers[mirrored, :, 0] = 1 - centers[mirrored, :, 0]
        return centers


def draw(scenes: Scenes, side_px: int) -> np.ndarray:
    """Draw scenes with smooth edges.

    Returns:
        uint8[N, side_px, side_px, 3] in RGB.
    """
    grounds = [BACKGROUNDS[caption.background] for caption in scenes.captions] + scenes.tints[:, 0]
    images = np.empty((len(scenes), side_px, side_px, 3), np.uint8)
    images[:] = np.clip(grounds, 0, 255)[:, None, None, :]
    for index, caption in enumerate(scenes.captions):
        for number, (color, shape) in enumerate(caption.things):
            rgb = np.clip(COLORS[color] + scenes.tints[index, number + 1], 0, 255)
            _draw_object(
                images[index], shape, rgb, scenes.centers[index, number], scenes.sizes[index, number]
            )
    return images


def _draw_object(image: np.ndarray, shape: str, rgb: np.ndarray, center: np.ndarray, size: float) -> None:
    """Blend one object into uint8[S, S, 3], in place."""
    half_px = size * len(image) / 2
    center_px = center * len(image)
    left, top = np.maximum(np.floor(center_px - half_px - 1), 0).astype(int)
    right, bottom = np.ceil(center_px + half_px + 1).astype(int)
    window = image[top:bottom, left:right]
    u = (np.arange(left, left + window.shape[1], dtype=np.float32) + 0.5 - center_px[0]) / half_px
    v = (np.arange(top, top + window.shape[0], dtype=np.float32) + 0.5 - center_px[1]) / half_px
    distance_px = _distance(shape, u[None, :], v[:, None]) * half_px
    cover = np.clip(0.5 - distance_px, 0, 1).astype(np.float32)[..., None]
    window[:] = window + cover * (rgb.astype(np.float32) - window) + 0.5


def _distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the distance to the outline of a shape that fills u, v in [-1, 1], negative inside (v
    downwards)."""
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
