"""For tests and benchmarks: an engine without a model, and checkpoints with random weights.

`FakeEngineConfig` builds a `FakeEngine`, which costs a given time and imports neither torch nor transformers.
The `save_…` functions write ordinary checkpoint folders, which transformers and the engine both load: tiny
ones for comparison with transformers, and larger ones for measuring speed.

Names whose modules import torch are imported when they are first used: a fake engine needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from blip2_actor.testing.fake_answers import fake_caption, fake_features, fake_score
from blip2_actor.testing.fake_engine import DeviceFault, FakeEngine, FakeEngineConfig, captions_made

if TYPE_CHECKING:
    from blip2_actor.testing.random_checkpoints import random_config, save_random_checkpoint
    from blip2_actor.testing.random_weights import randomize_weights
    from blip2_actor.testing.tiny_checkpoints import (
        EOS_TOKEN_ID,
        IMAGE_SIZE_PX,
        IMAGE_TOKEN_ID,
        NUM_QUERIES,
        random_images,
        save_tiny_checkpoint,
        tiny_config,
        tiny_tokenizer,
    )
    from blip2_actor.testing.tiny_retrieval import save_tiny_retrieval_checkpoint
    from blip2_actor.testing.tokenizer import byte_tokenizer

__all__ = [
    "DeviceFault",
    "EOS_TOKEN_ID",
    "FakeEngine",
    "FakeEngineConfig",
    "IMAGE_SIZE_PX",
    "IMAGE_TOKEN_ID",
    "NUM_QUERIES",
    "byte_tokenizer",
    "captions_made",
    "fake_caption",
    "fake_features",
    "fake_score",
    "random_config",
    "random_images",
    "randomize_weights",
    "save_random_checkpoint",
    "save_tiny_checkpoint",
    "save_tiny_retrieval_checkpoint",
    "tiny_config",
    "tiny_tokenizer",
]

_LAZY = ("tokenizer", "random_weights", "random_checkpoints", "tiny_checkpoints", "tiny_retrieval")
"""The modules that import torch or transformers."""


def __getattr__(name: str) -> Any:
    if name in __all__:
        modules = (import_module(f"{__name__}.{module}") for module in _LAZY)
        return next(getattr(module, name) for module in modules if hasattr(module, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
