"""How an engine is built: frozen values that every host can be sent.

`EngineConfig` is for checkpoints with a language model, `MatchingConfig` for retrieval checkpoints. This
module imports the two engines only when it builds them; nothing else in the engine imports this module.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from blip2_actor.flags import formerly, without_flag
from blip2_actor.inputs.field_types import require_types
from blip2_actor.quantization.choice import QuantizationChoice
from blip2_actor.request import ModelInfo

if TYPE_CHECKING:
    from blip2_actor.engine.engine import Engine
    from blip2_actor.engine.matching_engine import MatchingEngine


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which checkpoint, on which device and in which dtype: what every engine needs to know."""

    model: str
    """Hub name, folder, or s3:// or gs:// folder."""
    revision: str | None = None
    """Commit, tag or branch of a hub model; pin it for reproducible captions."""
    device: str = "auto"
    """"auto" takes the first accelerator, or the CPU if there is none; or name a torch device such as
    "cuda:0"."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """"auto" is bfloat16 if the device is fast in it, else float32."""
    num_threads: int | None = None
    """CPU threads of the engine; by default, torch chooses."""
    allow_urls: bool = False
    """Fetch images that are given as http or https URLs, from public addresses only."""

    def __post_init__(self) -> None:
        require_types(self)
        if not self.model:
            raise ValueError('model must be a hub name, a folder or "demo", got an empty string')
        self._require_positive("num_threads")

    def _require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class EngineConfig(ModelConfig):
    """Which captioning model, where, and how much at once.

    `info()` describes the model without loading it, `build()` loads it and starts an engine.

    Examples:
        >>> config = EngineConfig(model="demo", device="cpu", dtype="float32")
        >>> config.info().image_size_px
        64
        >>> with config.build() as engine:
        ...     engine.generate([Request(image=picture)])[0].text
        'a red circle on a white background'
    """

    model: str = "Salesforce/blip2-opt-2.7b"
    """Hub name, folder, s3:// or gs:// folder, or "demo" for the small checkpoint that is part of this
    package."""
    adapter: str | None = None
    """LoRA adapter of PEFT to merge into the model: hub name, folder, or s3:// or gs:// folder; or a .pth
    file that LAVIS has trained from the model; default: the adapter in the folder of the model, if there is
    one."""
    max_slots: int | None = None
    """Texts generated at once; by default, as many as free memory allows."""
    encode_batch: int | None = None
    """Images per pass of the vision encoder; by default, chosen by device and free memory."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the vision encoder and the Q-Former for full batches. This needs a C compiler, and triton on a
    GPU. "auto" compiles quantized encoders whose inputs no kernel scales, on a GPU, if both are installed."""
    device_map: str | None = None
    """Split a model that is too large for one device. "auto", "balanced" and "sequential" plan by free
    memory; a JSON object places modules by name: {"vision": 0, "language_model": 1,
    "language_model.layers.31": "disk"}."""
    skip_self_test: bool = field(default=False, metadata=formerly("skip_canary"))
    """Do not test the engine at start. The test captions built-in images alone and in a batch, and refuses to
    start if the results differ."""
    skip_cuda_graphs: bool = False
    """On a GPU, launch the kernels of decode steps and of full batches of images one by one instead of
    replaying them as CUDA graphs."""
    image_size_px: int | None = None
    """Size to which images are resized, if it is not the checkpoint's: a multiple of its patch size. The
    position embeddings are interpolated; a larger size shows more detail and takes longer."""
    ignore_generation_config: bool = False
    """Do not take options of generation that are not given from the checkpoint's generation_config.json."""
    quantize: Literal["int8", "fp8", "int8-weights"] | None = None
    """int8 computes in int8: faster for large models, but some captions change. On a CPU, parts of the model
    that would not be faster stay as they are. fp8 does the same on GPUs from compute capability 8.9.
    int8-weights stores the language model in int8 and computes as before: less memory, not faster. blip2
    plan with this flag shows the gain and the changes."""
    quantization_choice: QuantizationChoice | None = field(default=None, metadata=without_flag())
    """What `choose_quantization` has chosen, perhaps on another machine; default: chosen when the engine is
    built. The workers of one job take the same choice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("max_slots", "encode_batch", "image_size_px")
        if self.adapter == "":
            raise ValueError("adapter must be a hub name or a folder, got an empty string")
        if self.device_map is not None:
            _check_device_map(self.device_map)
            if self.compile is True:
                raise ValueError(
                    "compile must not be true if device_map splits the model, got both; drop one of them"
                )
            if self.quantize is not None:
                raise ValueError("device_map must be left out with quantize, got both; drop one of them")
        if self.quantization_choice is not None and self.quantization_choice.method != self.quantize:
            raise ValueError(
                f"quantization_choice must be one for quantize={self.quantize!r}, got one for "
                f"{self.quantization_choice.method!r}; choose again with choose_quantization"
            )

    def info(self) -> ModelInfo:
        """Describe the model without loading weights.

        Raises:
            ValueError: the checkpoint is not a BLIP-2 model that this package runs.
            OSError: the checkpoint cannot be found or fetched; the message names the alternatives.
        """
        from blip2_actor.checkpoints.checkpoint import describe

        if self.quantize is not None:
            from blip2_actor.device import resolve_device
            from blip2_actor.quantization.methods import require_method

            require_method(self.quantize, resolve_device(self.device))
        info = describe(
            self.model,
            self.revision,
            self.device,
            self.dtype,
            lambda checkpoint: checkpoint.config,
            adapter=self.adapter,
            ignore_generation_config=self.ignore_generation_config,
            image_size_px=self.image_size_px,
        )
        return replace(info, quantize=self.quantize)

    def choose_quantization(self) -> QuantizationChoice | None:
        """Choose what `quantize` means on this machine, by a measurement of seconds; no weights are read.

        Returns:
            The choice, for `quantization_choice`; None without `quantize`.

        Raises:
            ValueError, OSError: as from `info`.
        """
        if self.quantize is None or self.quantization_choice is not None:
            return self.quantization_choice
        from blip2_actor.checkpoints.checkpoint import resolve
        from blip2_actor.checkpoints.loading import choose_quantization
        from blip2_actor.device import resolve_device, resolve_dtype

        place, info = resolve_device(self.device), self.info()
        checkpoint = resolve(self.model, self.revision, with_weights=False, adapter=self.adapter)
        dtype = resolve_dtype(self.dtype, place)
        return choose_quantization(checkpoint, self.quantize, place, dtype, info.image_size_px)

    def check_prompts(self, prompts: Sequence[str], max_new_tokens: int) -> None:
        """Refuse prompts that the model cannot take, before any work begins; no weights are read.

        Raises:
            TypeError: `prompts` is a single text.
            ValueError: a prompt is not text, contains the image token, or leaves no room for the answer.
            OSError: as from `info`.
        """
        from blip2_actor.checkpoints.checkpoint import resolve
        from blip2_actor.checkpoints.tokenizer import check_prompts
        from blip2_actor.inputs.arguments import to_texts

        prompts = to_texts("prompts", prompts)
        checkpoint = resolve(self.model, self.revision, with_weights=False, adapter=self.adapter)
        check_prompts(checkpoint, prompts, max_new_tokens)

    def build(self) -> Engine:
        """Load the weights and start the engine.

        Raises:
            ValueError: as from `info`; or the device, the dtype or the memory does not suffice.
            OSError: as from `info`.
        """
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
    """Which retrieval checkpoint (`Blip2ForImageTextRetrieval`), and where it runs.

    Examples:
        >>> with MatchingConfig(model=retrieval_folder, device="cpu").build() as engine:
        ...     matches = engine.score([picture, picture], ["a dog", "a cat"])
        >>> [0 <= match.itm <= 1 for match in matches]
        [True, True]
    """

    model: str = "Salesforce/blip2-itm-vit-g"
    """Hub name, folder, or s3:// or gs:// folder of a retrieval checkpoint."""

    def info(self) -> ModelInfo:
        """Describe the model without loading weights; raises what `EngineConfig.info` raises."""
        from blip2_actor.checkpoints.checkpoint import describe

        return describe(
            self.model, self.revision, self.device, self.dtype, lambda checkpoint: checkpoint.retrieval_config
        )

    def build(self) -> MatchingEngine:
        """Load the weights; raises what `EngineConfig.build` raises."""
        from blip2_actor.engine.matching_engine import MatchingEngine

        return MatchingEngine(self)
