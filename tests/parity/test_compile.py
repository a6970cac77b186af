"""Compiled encoders give what the plain ones give, whatever the last batch's size."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from blip2_actor import Engine, EngineConfig, GenerationOptions, Request
from tests.parity.tiny import images


@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
def test_compiled_encoders_give_the_same_captions(checkpoint_folder: Callable[..., Path]) -> None:
    """Five images in batches of four: the second batch is filled up, and its filling must not come out."""
    asked = [Request(image=image.numpy()) for image in images(5)]
    found = []
    for compiled in (False, True):
        config = EngineConfig(
            model=str(checkpoint_folder()),
            dtype="float32",
            device="cpu",
            num_threads=1,
            encode_batch=4,
            compile=compiled,
        )
        torch.compiler.reset()
        with Engine(config) as engine:
            found.append([r.token_ids for r in engine.generate(asked, GenerationOptions(max_new_tokens=8))])
    assert found[0] == found[1]
