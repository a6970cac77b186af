"""The answers of the fake engine: digests of the pixels, so that a test knows the right answer for every row.

Two images have different answers, so a mix-up of rows is visible in the output.
"""

from __future__ import annotations

import hashlib

import numpy as np

from blip2_actor.request import Features

VISION_WIDTH, QFORMER_WIDTH, NUM_QUERIES, GRID_SIDE = 5, 3, 2, 4
"""Shapes of the features; they differ, so that a transposed array is noticed."""


def fake_caption(pixels: np.ndarray, prompt: str | None = None) -> str:
    """Return the caption of uint8[H, W, 3]: the prompt, if there is one, and 16 hexadecimal digits."""
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()[:16]
    return f"{prompt} {digest}" if prompt else digest


def fake_features(pixels: np.ndarray, with_attention_maps: bool = False) -> Features:
    """Return the features of uint8[H, W, 3]: random numbers whose seed is a digest of the pixels."""
    seed = int.from_bytes(hashlib.sha256(pixels.tobytes()).digest()[:8])
    random = np.random.default_rng(seed)
    return Features(
        pooler_output=random.random(VISION_WIDTH, np.float32),
        qformer_features=random.random((NUM_QUERIES, QFORMER_WIDTH), np.float32),
        attention_maps=(
            {
                "qformer.layers.0.cross_attention": random.random(
                    (1, NUM_QUERIES, 1 + GRID_SIDE**2), np.float32
                )
            }
            if with_attention_maps
            else None
        ),
    )


def fake_score(pixels: np.ndarray, text: str, prompt: str | None = None) -> float:
    """Return the score of a text for uint8[H, W, 3]: between -1 and 0."""
    digest = hashlib.sha256(f"{fake_caption(pixels, prompt)} {text}".encode()).digest()
    return -digest[0] / 256
