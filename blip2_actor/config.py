"""How an engine is built: frozen values that travel to every host.

`EngineConfig` is for checkpoints with a language model, `MatchingConfig` for those of image-text retrieval.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from blip2_actor.flags import formerly
from blip2_actor.request import ModelInfo

if TYPE_CHECKING:
    from blip2_actor.engine.engine import Engine
    from blip2_actor.engine.matching_engine import MatchingEngine


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which checkpoint, where and in what dtype: what every engine is told."""

    model: str
    """Hub name, folder, s3:// or gs:// folder."""
    revision: str | None = None
    """Commit, tag or branch of a hub model; pin it for reproducible captions."""
    device: str = "auto"
    """"auto" takes the first accelerator, else the CPU; or a torch device such as "cuda:0"."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """"auto" is bfloat16 where the device computes in it, float32 elsewhere."""
    num_threads: int | None = None
    """CPU threads of the engine; None keeps torch's own choice."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError('model must be a hub name, a folder or "demo", got an empty text')
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}")
        self._require_positive("num_threads")

    def _require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class EngineConfig(ModelConfig):
    """Which model, where and in what shape. `build()` gives the engine, `info()` only describes it."""

    model: str = "Salesforce/blip2-opt-2.7b"
    """Hub name, folder, s3:// or gs:// folder, or "demo" for the checkpoint that comes with the project."""
    max_slots: int | None = None
    """Texts decoded at once; None sizes them from free memory."""
    encode_batch: int | None = None
    """Images per pass of the vision encoder; None chooses by device and free memory."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the vision encoder and the Q-Former for full batches; needs a C compiler, and triton on a GPU.
    "auto" does so on a GPU that has both."""
    device_map: str | None = None
    """Split a model that is too large for one device: "auto", "balanced" or "sequential" plan by free memory,
    a JSON object names modules: {"vision": 0, "language_model": 1, "language_model.layers.31": "disk"}."""
    skip_self_test: bool = field(default=False, metadata=formerly("skip_canary"))
    """Start without captioning built-in images alone and batched, which refuses to run where they differ."""
    skip_cuda_graphs: bool = False
    """On a GPU, launch the kernels of a decode step one by one instead of replaying them as a graph."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("max_slots", "encode_batch")
        if self.device_map is not None:
            _check_device_map(self.device_map)
            if self.compile is True:
                raise ValueError("compile must be off where device_map splits the model, got both")

    def info(self) -> ModelInfo:
        """Describe the model without loading weights.

        Raises:
            ValueError: the checkpoint is not a BLIP-2 this package runs.
            OSError: it cannot be found or fetched; the message names the alternatives.
        """
        from blip2_actor.checkpoints.checkpoint import describe

        return describe(
            self.model, self.revision, self.device, self.dtype, lambda checkpoint: checkpoint.config
        )

    def check_prompts(self, prompts: Sequence[str], max_new_tokens: int) -> None:
        """Refuse prompts that the model cannot take, before any work is begun; no weights are read.

        Raises:
            ValueError: one is no text, holds the image token, or leaves no room for its answer.
            OSError: as from `info`.
        """
        from blip2_actor.checkpoints.checkpoint import resolve
        from blip2_actor.checkpoints.tokenizer import check_prompts

        check_prompts(resolve(self.model, self.revision, with_weights=False), prompts, max_new_tokens)

    def build(self) -> Engine:
        """Load the weights and start the engine; raises what `info` raises, and more."""
        from blip2_actor.engine.engine import Engine

        return Engine(self)


def _check_device_map(device_map: str) -> None:
    if device_map in ("auto", "balanced", "sequential"):
        return
    try:
        places = json.loads(device_map)
    except json.JSONDecodeError:
        places = None
    if not isinstance(places, dict) or any(type(place) not in (int, str) for place in places.values()):
        raise ValueError(
            "device_map must be auto, balanced, sequential or a JSON object from module names to a number, "
            f'"cpu" or "disk", got {device_map!r}'
        )


@dataclass(frozen=True, kw_only=True)
class MatchingConfig(ModelConfig):
    """A checkpoint of image-text retrieval (`Blip2ForImageTextRetrieval`), and where it runs."""

    model: str = "Salesforce/blip2-itm-vit-g"
    """Hub name, folder, s3:// or gs:// folder of a retrieval checkpoint."""

    def info(self) -> ModelInfo:
        """As `EngineConfig.info`."""
        from blip2_actor.checkpoints.checkpoint import describe

        return describe(
            self.model, self.revision, self.device, self.dtype, lambda checkpoint: checkpoint.retrieval_config
        )

    def build(self) -> MatchingEngine:
        """Load the weights; raises what `info` raises, and more."""
        from blip2_actor.engine.matching_engine import MatchingEngine

        return MatchingEngine(self)
