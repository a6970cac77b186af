"""BLIP-2 as an engine: captions, answers, scores and embeddings, with the token ids of the reference.

`__all__` is the public interface. Importing the package imports neither Ray nor pyarrow. It imports torch,
numpy, Pillow and httpcore only when a name that needs them is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from blip2_actor.actor import Blip2Actor
from blip2_actor.confidence.calibration import Calibration, abstention_flags
from blip2_actor.config import EngineConfig, MatchingConfig
from blip2_actor.generation.quality_flags import find_quality_flags, stricter_options
from blip2_actor.options import GenerationOptions
from blip2_actor.protocols import EngineBuilder, EngineLike
from blip2_actor.quantization.choice import QuantizationChoice
from blip2_actor.request import (
    Completion,
    Embedding,
    EngineStats,
    Features,
    FinishReason,
    ImageLike,
    LogitsProcessor,
    Match,
    ModelInfo,
    Request,
    Result,
    Score,
    TextFeatures,
)
from blip2_actor.status import Status
from blip2_actor.version import __version__

if TYPE_CHECKING:
    from blip2_actor.checkpoints.training import (
        load_for_training,
        load_retrieval_for_training,
        save_model,
    )
    from blip2_actor.confidence.fitting import fit_calibration
    from blip2_actor.device import resolve_device, resolve_dtype
    from blip2_actor.engine.engine import Engine
    from blip2_actor.engine.matching_engine import MatchingEngine
    from blip2_actor.engine.memory import free_bytes
    from blip2_actor.inputs.fetch_policy import FetchError, FetchPolicy
    from blip2_actor.inputs.fetching import fetch_image
    from blip2_actor.inputs.result_sheet import ResultSheet
    from blip2_actor.preprocessing.arrays import (
        array_to_rgb,
        require_image_layout,
        resize_image,
        upright_size,
    )
    from blip2_actor.preprocessing.decode_pool import DecodePool
    from blip2_actor.preprocessing.images import DecodedImage, ImageLimits, decode_image
    from blip2_actor.preprocessing.sandbox.protections import SandboxReport

__all__ = [
    "Blip2Actor",
    "Calibration",
    "Completion",
    "DecodePool",
    "DecodedImage",
    "Embedding",
    "Engine",
    "EngineBuilder",
    "EngineConfig",
    "EngineLike",
    "EngineStats",
    "Features",
    "FetchError",
    "FetchPolicy",
    "FinishReason",
    "GenerationOptions",
    "ImageLike",
    "ImageLimits",
    "LogitsProcessor",
    "Match",
    "MatchingConfig",
    "MatchingEngine",
    "ModelInfo",
    "QuantizationChoice",
    "Request",
    "Result",
    "ResultSheet",
    "SandboxReport",
    "Score",
    "Status",
    "TextFeatures",
    "__version__",
    "abstention_flags",
    "array_to_rgb",
    "decode_image",
    "fetch_image",
    "find_quality_flags",
    "fit_calibration",
    "free_bytes",
    "load_for_training",
    "load_retrieval_for_training",
    "require_image_layout",
    "resize_image",
    "resolve_device",
    "resolve_dtype",
    "save_model",
    "stricter_options",
    "upright_size",
]

_LAZY = {
    "Engine": "blip2_actor.engine.engine",
    "MatchingEngine": "blip2_actor.engine.matching_engine",
    "DecodePool": "blip2_actor.preprocessing.decode_pool",
    "DecodedImage": "blip2_actor.preprocessing.images",
    "FetchError": "blip2_actor.inputs.fetch_policy",
    "FetchPolicy": "blip2_actor.inputs.fetch_policy",
    "ImageLimits": "blip2_actor.preprocessing.images",
    "ResultSheet": "blip2_actor.inputs.result_sheet",
    "SandboxReport": "blip2_actor.preprocessing.sandbox.protections",
    "decode_image": "blip2_actor.preprocessing.images",
    "free_bytes": "blip2_actor.engine.memory",
    "resolve_device": "blip2_actor.device",
    "resolve_dtype": "blip2_actor.device",
    "load_for_training": "blip2_actor.checkpoints.training",
    "load_retrieval_for_training": "blip2_actor.checkpoints.training",
    "save_model": "blip2_actor.checkpoints.training",
    "fit_calibration": "blip2_actor.confidence.fitting",
    "fetch_image": "blip2_actor.inputs.fetching",
    "array_to_rgb": "blip2_actor.preprocessing.arrays",
    "require_image_layout": "blip2_actor.preprocessing.arrays",
    "resize_image": "blip2_actor.preprocessing.arrays",
    "upright_size": "blip2_actor.preprocessing.arrays",
}
"""Names whose modules import torch, numpy, Pillow or httpcore, with the module of each."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Name what is imported late too, for completion in a notebook."""
    return sorted({*globals(), *__all__})
