"""For tests and benchmarks: an engine without a model, and checkpoints with random weights.

`FakeEngineConfig` builds a `FakeEngine`, which costs a given time and imports neither torch nor transformers.
The `save_…` functions write ordinary checkpoint folders, which transformers and the engine both load: tiny
ones for comparison with transformers, and larger ones for measuring speed.

Names are imported when they are first used, so that a worker with a fake engine imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blip2_actor.testing.fake_answers import fake_caption, fake_features, fake_score
    from blip2_actor.testing.fake_engine import DeviceFault, FakeEngine, FakeEngineConfig, captions_made
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

_MODULES = {
    "fake_answers": ("fake_caption", "fake_features", "fake_score"),
    "fake_engine": ("DeviceFault", "FakeEngine", "FakeEngineConfig", "captions_made"),
    "random_checkpoints": ("random_config", "save_random_checkpoint"),
    "random_weights": ("randomize_weights",),
    "tiny_checkpoints": (
        "EOS_TOKEN_ID",
        "IMAGE_SIZE_PX",
        "IMAGE_TOKEN_ID",
        "NUM_QUERIES",
        "random_images",
        "save_tiny_checkpoint",
        "tiny_config",
        "tiny_tokenizer",
    ),
    "tiny_retrieval": ("save_tiny_retrieval_checkpoint",),
    "tokenizer": ("byte_tokenizer",),
}
"""Each module of this package and the names that it gives."""


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
