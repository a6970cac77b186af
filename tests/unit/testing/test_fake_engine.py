"""The fake engine is light, and a drop-in replacement for the engine."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from blip2_actor import EngineBuilder, EngineLike, Request, testing


def test_the_fake_engine_imports_neither_torch_nor_transformers() -> None:
    """Ray starts many workers in a test; torch would cost each of them seconds and hundreds of megabytes."""
    program = (
        "import sys\n"
        "from blip2_actor.testing import FakeEngineConfig\n"
        "FakeEngineConfig().build().close()\n"
        "print(*sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "tokenizers", "ray"} & set(done.stdout.split())


def test_every_public_name_exists() -> None:
    """The names are imported on first use, so a misspelled module would go unnoticed."""
    assert all(hasattr(testing, name) for name in testing.__all__)


def test_a_shared_image_is_encoded_once() -> None:
    recipe: EngineBuilder = testing.FakeEngineConfig()
    engine: EngineLike = recipe.build()
    shared = engine.image(np.zeros((4, 4, 3), np.uint8))
    texts = [result.text for result in engine.generate([Request(image=shared), Request(image=shared)])]
    engine.score([shared], ["a dog"])
    assert texts == [testing.fake_caption(np.zeros((4, 4, 3), np.uint8))] * 2
    assert engine.stats().num_images_encoded == 1
    engine.close()
