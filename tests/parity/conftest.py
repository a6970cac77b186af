"""One reference model and one checkpoint folder per variant, made once per session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import Blip2ForConditionalGeneration

from blip2_actor.testing import save_tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Call `checkpoint_folder("opt", do_layer_norm_before=False)` to get a saved random checkpoint."""

    @cache
    def make(language: str = "opt", **options: Any) -> Path:
        return save_tiny_checkpoint(tmp_path_factory.mktemp(language), language, **options)

    return make


@pytest.fixture(scope="session")
def reference(checkpoint_folder: Callable[..., Path]) -> Callable[..., Blip2ForConditionalGeneration]:
    """The same checkpoint, loaded by transformers."""

    @cache
    def load(language: str = "opt", **options: Any) -> Blip2ForConditionalGeneration:
        return Blip2ForConditionalGeneration.from_pretrained(checkpoint_folder(language, **options)).eval()

    return load
