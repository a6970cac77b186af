"""Training examples: scenes as the model will meet them, and what there is to know about each.

The pictures vary as files do: drawn at several sizes, some through JPEG, all resized bicubically to the
model's size, with a little noise.
"""

from __future__ import annotations

import io
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from blip2_actor.demo.scenes import (
    ARRANGEMENTS,
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    Caption,
    Scenes,
    SceneSampler,
    Split,
    draw,
)

IMAGE_SIDE_PX = 64
PATCH_PX = 8
NUM_PATCHES = (IMAGE_SIDE_PX // PATCH_PX) ** 2
DRAWN_SIDES_PX = (64, 64, 80, 96, 128, 192)
_CHUNK = 500
_BICUBIC = Image.Resampling.BICUBIC


@dataclass(frozen=True, eq=False)
class Examples:
    """N scenes; labels count from 1, and 0 means that there is no such object."""

    captions: tuple[Caption, ...]
    images: np.ndarray
    """uint8[N, 64, 64, 3]"""
    attributes: np.ndarray
    """int64[N, 6]: first colour, first shape, second colour, second shape, arrangement, background."""
    patches: np.ndarray
    """int64[N, 64, 3]: colour and shape of the object in whose square the patch's centre lies, and
    whether it is named first (1) or second (2)."""


def make_examples(split: Split, seed: int, num_examples: int, num_processes: int = 2) -> Examples:
    """Draw examples of one split; equal arguments give equal examples, however many processes draw."""
    sizes = [min(_CHUNK, num_examples - start) for start in range(0, num_examples, _CHUNK)]
    jobs = ([split] * len(sizes), [seed * 100_003 + i for i in range(len(sizes))], sizes)
    if num_processes == 1:
        chunks = list(map(_make_chunk, *jobs))
    else:
        with ProcessPoolExecutor(num_processes) as pool:
            chunks = list(pool.map(_make_chunk, *jobs))
    return Examples(
        tuple(caption for chunk in chunks for caption in chunk.captions),
        np.concatenate([chunk.images for chunk in chunks]),
        np.concatenate([chunk.attributes for chunk in chunks]),
        np.concatenate([chunk.patches for chunk in chunks]),
    )


def _make_chunk(split: Split, seed: int, num_examples: int) -> Examples:
    rng = np.random.default_rng([seed, 1])
    scenes = SceneSampler(split, seed).sample(num_examples)
    images = np.empty((num_examples, IMAGE_SIDE_PX, IMAGE_SIDE_PX, 3), np.uint8)
    step = 50
    for start in range(0, num_examples, step):
        drawn = draw(scenes.slice(start, start + step), int(rng.choice(DRAWN_SIDES_PX)))
        for offset, image in enumerate(drawn):
            images[start + offset] = _as_a_file(image, rng)
    noise = rng.normal(0, rng.uniform(0, 3, (num_examples, 1, 1, 1)), images.shape)
    images = np.clip(images + noise + 0.5, 0, 255).astype(np.uint8)
    return Examples(scenes.captions, images, _attributes(scenes.captions), _patches(scenes))


def _as_a_file(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    picture = Image.fromarray(image)
    if rng.random() < 0.5:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=int(rng.integers(70, 96)))
        picture = Image.open(file)
    if picture.width != IMAGE_SIDE_PX:
        picture = picture.resize((IMAGE_SIDE_PX, IMAGE_SIDE_PX), _BICUBIC)
    return np.asarray(picture)


def _attributes(captions: tuple[Caption, ...]) -> np.ndarray:
    colours, shapes, backgrounds = list(COLOURS), list(SHAPES), list(BACKGROUNDS)
    rows = []
    for caption in captions:
        row = [colours.index(caption.first[0]) + 1, shapes.index(caption.first[1]) + 1, 0, 0, 0]
        if caption.second is not None and caption.arrangement is not None:
            row[2:] = [
                colours.index(caption.second[0]) + 1,
                shapes.index(caption.second[1]) + 1,
                ARRANGEMENTS.index(caption.arrangement) + 1,
            ]
        rows.append([*row, backgrounds.index(caption.background) + 1])
    return np.array(rows, np.int64)


def _patches(scenes: Scenes) -> np.ndarray:
    grid = (np.arange(IMAGE_SIDE_PX // PATCH_PX) + 0.5) * PATCH_PX / IMAGE_SIDE_PX
    y, x = np.meshgrid(grid, grid, indexing="ij")
    attributes = _attributes(scenes.captions)
    labels = np.zeros((len(scenes), grid.size**2, 3), np.int64)
    for slot in range(2):
        away = np.maximum(
            np.abs(x.ravel() - scenes.centres[:, slot, :1]), np.abs(y.ravel() - scenes.centres[:, slot, 1:])
        )
        inside = away < scenes.sizes[:, slot, None] / 2
        for kind in range(2):
            labels[..., kind] = np.where(inside, attributes[:, slot * 2 + kind, None], labels[..., kind])
        labels[..., 2][inside] = slot + 1
    return labels
