"""Attention maps of the Q-Former point at the objects of drawn scenes, whose places are known."""

from __future__ import annotations

import numpy as np
import pytest

from blip2_actor import EngineConfig, Features
from blip2_actor.demo.scenes import Scenes, SceneSampler, draw

NUM_SCENES = 80


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return SceneSampler("held_out", 20_262).sample(NUM_SCENES)


@pytest.fixture(scope="module")
def grids(scenes: Scenes) -> np.ndarray:
    """float32[N, R, R]"""
    with EngineConfig(model="demo", device="cpu").build() as engine:
        found = engine.features(list(draw(scenes, 160)), with_attention_maps="*.cross_attention")
    return np.array([features.attention_grid for features in found])


def is_on_object(scenes: Scenes, places: np.ndarray) -> np.ndarray:
    """Return bool[N]: whether (x, y) of float[N, 2] is in the square around one of the scene's objects."""
    distance = np.abs(places[:, None] - scenes.centers).max(axis=-1)
    return (distance < scenes.sizes / 2).any(axis=1)


def peaks(grids: np.ndarray) -> np.ndarray:
    """Return (x, y) of the patch with the largest weight, as fractions of the image's side."""
    rows, columns = np.divmod(grids.reshape(len(grids), -1).argmax(axis=1), grids.shape[-1])
    return (np.stack([columns, rows], axis=1) + 0.5) / grids.shape[-1]


def test_it_points_at_objects_better_than_the_center_and_than_other_scenes(scenes, grids):
    points = peaks(grids)
    hits = is_on_object(scenes, points).mean()
    center = is_on_object(scenes, np.full_like(points, 0.5)).mean()
    of_another_scene = is_on_object(scenes, np.roll(points, 1, axis=0)).mean()
    print(f"pointing score {hits:.2f}; center {center:.2f}, of another scene {of_another_scene:.2f}")
    assert hits > 0.7
    assert hits > 2 * center and hits > 1.5 * of_another_scene


def test_a_grid_is_a_distribution_over_the_image(grids):
    assert grids.shape == (NUM_SCENES, 8, 8) and (grids >= 0).all()
    assert grids.sum(axis=(1, 2)) == pytest.approx(np.ones(NUM_SCENES), abs=1e-5)


def test_a_grid_leaves_out_the_class_token_and_starts_at_the_top():
    maps = np.zeros((1, 2, 5), np.float32)
    maps[..., 0] = 0.6
    maps[..., 2] = 0.4  # row 0, column 1
    grid = Features(
        attention_maps={"qformer.layers.0.cross_attention": maps, "vision.layers.0.self_attention": maps}
    ).attention_grid
    assert grid is not None and grid.tolist() == [[0, 1], [0, 0]]
    assert Features().attention_grid is None
