"""BLIP-2 as an engine: captions, answers, scores and embeddings, exact against the reference.

Imports neither Ray nor pyarrow, and torch only when an engine is built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blip2_actor.actor import Blip2Actor
from blip2_actor.config import EngineConfig
from blip2_actor.options import GenerationOptions
from blip2_actor.request import Completion, EngineStats, Features, ModelInfo, Request, Result, Score
from blip2_actor.status import Status

if TYPE_CHECKING:
    from blip2_actor.engine import Engine

__all__ = [
    "Blip2Actor",
    "Completion",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "Features",
    "GenerationOptions",
    "ModelInfo",
    "Request",
    "Result",
    "Score",
    "Status",
]


def __getattr__(name: str) -> Any:
    # Engine brings torch: decode workers and drivers import this package without it.
    if name == "Engine":
        from blip2_actor.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
