"""The examples in the docstrings of public classes print what they say."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

import blip2_actor
from blip2_actor import Calibration, EngineConfig, MatchingConfig
from blip2_actor.confidence.features import FEATURES
from blip2_actor.testing import save_tiny_retrieval_checkpoint

WHITE, RED = (248, 248, 248), (215, 35, 35)
"""The side of the scenes that the demonstration checkpoint was trained on."""

WITH_EXAMPLES = [
    "Blip2Actor",
    "Calibration",
    "Engine",
    "EngineConfig",
    "Features",
    "Match",
    "MatchingConfig",
    "MatchingEngine",
    "Request",
    "Result",
    "Score",
]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The names that the examples may use: the public ones, a picture, and one engine of each kind."""
    picture = Image.new("RGB", (64, 64), WHITE)
    ImageDraw.Draw(picture).ellipse((16, 16, 48, 48), fill=RED)
    folder: Path = save_tiny_retrieval_checkpoint(tmp_path_factory.mktemp("retrieval"))
    public = {name: getattr(blip2_actor, name) for name in blip2_actor.__all__}
    with (
        EngineConfig(model="demo", device="cpu", num_threads=1).build() as engine,
        MatchingConfig(model=str(folder), device="cpu", num_threads=1).build() as matching_engine,
    ):
        yield public | {
            "picture": picture,
            "retrieval_folder": str(folder),
            "engine": engine,
            "calibration": Calibration(
                coefficients=dict.fromkeys(FEATURES, 0.1), intercept=0, curve=[(0, 0.5)], model="demo"
            ),
            "matching_engine": matching_engine,
        }


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_example_of_a_public_class_runs(name: str, names: dict[str, Any]) -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(names[name], name, globs=dict(names))
    assert example.examples, "the docstring must have an example"
    assert not doctest.DocTestRunner(verbose=False).run(example).failed
