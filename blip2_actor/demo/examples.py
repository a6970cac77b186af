"""Training examples: images of scenes, and labels for everything that the model is to learn about them.

The images vary as real files do. They are drawn at several sizes, half of them are encoded as JPEG, and all
are resized bicubically to the model's size and get a little noise.
"""

from __future__ import annotations

import io
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from blip2_actor.demo.grammar import ARRANGEMENTS, BACKGROUNDS, COLORS, SHAPES, Caption, Split
from blip2_actor.demo.scenes import Scenes, SceneSampler, draw

IMAGE_SIDE_PX = 64
PATCH_PX = 8
NUM_PATCHES = (IMAGE_SIDE_PX // PATCH_PX) ** 2
DRAWN_SIDES_PX = (64, 64, 80, 96, 128, 192)
_CHUNK_EXAMPLES = 500
_DRAWN_AT_ONCE = 50
_BICUBIC = Image.Resampling.BICUBIC


@dataclass(frozen=True, eq=False)
class Examples:
    """N scenes. Labels start at 1; 0 means that there is no such object."""

    captions: tuple[Caption, ...]
    images: np.ndarray
    """uint8[N, 64, 64, 3]"""
    attributes: np.ndarray
    """int64[N, 6]: first color, first shape, second color, second shape, arrangement, background."""
    patches: np.ndarray
    """int64[N, 64, 3]: color and shape of the object whose square contains the center of the patch, and
    whether it is named first (1) or second (2)."""


def make_examples(split: Split, seed: int, num_examples: int, num_processes: int = 2) -> Examples:
    """Draw examples of one split; equal arguments give equal examples, for any number of processes."""
    sizes = [min(_CHUNK_EXAMPLES, num_examples - start) for start in range(0, num_examples, _CHUNK_EXAMPLES)]
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
    for start in range(0, num_examples, _DRAWN_AT_ONCE):
        drawn = draw(scenes.slice(start, start + _DRAWN_AT_ONCE), int(rng.choice(DRAWN_SIDES_PX)))
        for offset, image in enumerate(drawn):
            images[start + offset] = _through_file(image, rng)
    noise = rng.normal(0, rng.uniform(0, 3, (num_examples, 1, 1, 1)), images.shape)
    images = np.clip(images + noise + 0.5, 0, 255).astype(np.uint8)
    return Examples(scenes.captions, images, _attributes(scenes.captions), _patches(scenes))


def _through_file(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    picture = Image.fromarray(image)
    if rng.random() < 0.5:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=int(rng.integers(70, 96)))
        picture = Image.open(file)
    if picture.width != IMAGE_SIDE_PX:
        picture = picture.resize((IMAGE_SIDE_PX, IMAGE_SIDE_PX), _BICUBIC)
    return np.asarray(picture)


def _attributes(captions: tuple[Caption, ...]) -> np.ndarray:
    colors, shapes, backgrounds = list(COLORS), list(SHAPES), list(BACKGROUNDS)
    rows = []
    for caption in captions:
        row = [colors.index(caption.first[0]) + 1, shapes.index(caption.first[1]) + 1, 0, 0, 0]
        if caption.second is not None and caption.arrangement is not None:
            row[2:] = [
                colors.index(caption.second[0]) + 1,
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
    for index in range(2):
        distance = np.maximum(
            np.abs(x.ravel() - scenes.centers[:, index, :1]), np.abs(y.ravel() - scenes.centers[:, index, 1:])
        )
        inside = distance < scenes.sizes[:, index, None] / 2
        for kind in range(2):
            labels[..., kind] = np.where(inside, attributes[:, index * 2 + kind, None], labels[..., kind])
        labels[..., 2][inside] = index + 1
    return labels
