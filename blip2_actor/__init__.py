"""BLIP-2 as an engine: captions, answers, scores and embeddings, exact against the reference.

Imports neither Ray nor pyarrow, and torch only when an engine is built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blip2_actor.actor import Blip2Actor
from blip2_actor.config import EngineConfig, MatchingConfig
from blip2_actor.options import GenerationOptions
from blip2_actor.request import (
    Completion,
    Embedding,
    EngineStats,
    Features,
    Match,
    ModelInfo,
    Request,
    Result,
    Score,
    TextFeatures,
)
from blip2_actor.status import Status

if TYPE_CHECKING:
    from blip2_actor.engine.engine import Engine
    from blip2_actor.engine.matching_engine import MatchingEngine

__all__ = [
    "Blip2Actor",
    "Completion",
    "Embedding",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "Features",
    "GenerationOptions",
    "Match",
    "MatchingConfig",
    "MatchingEngine",
    "ModelInfo",
    "Request",
    "Result",
    "Score",
    "Status",
    "TextFeatures",
]


def __getattr__(name: str) -> Any:
    # The engines bring torch: decode workers and drivers import this package without it.
    if name == "Engine":
        from blip2_actor.engine.engine import Engine

        return Engine
    if name == "MatchingEngine":
        from blip2_actor.engine.matching_engine import MatchingEngine

        return MatchingEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
