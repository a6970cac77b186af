"""Quantizing a model while its weights are read, along one pass of built-in images.

The pass runs the model as it is stored. When it comes to a layer that is to be quantized, the layer's weight
is read, its result is computed for the layers after it, and the weight becomes bytes. So every layer is
calibrated with the inputs of the unquantized model, the logits at the end are those of the unquantized model,
and one plain weight is in memory at a time.
"""

from __future__ import annotations

import ctypes
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip2_actor.models.blip2 import Blip2
from blip2_actor.models.layers import Activation, Linear, QuantizedWeight
from blip2_actor.models.opt import OptLayer
from blip2_actor.models.qformer import PostNormMlp
from blip2_actor.models.vision import VisionBlock
from blip2_actor.quantization.choice import QuantizationChoice
from blip2_actor.quantization.measurement import eligible, part_of
from blip2_actor.quantization.methods import StoreWeight, instructions, storage
from blip2_actor.quantization.row_scaled import RowScaledWeight
from blip2_actor.quantization.smoothing import Norm, divide, preceding_norms, smoothing_factors

logger = logging.getLogger(__name__)

MAX_LAYER_ERROR = 0.1
"""A layer stays as it is if its result differs by more, relative to the length of the result."""
CALIBRATION_ROWS = 256
"""Maximum number of a layer's input rows by which it is calibrated."""
TEXT = range(5, 13)
"""Token ids of the text that the calibration reads after each image."""


@dataclass(frozen=True, kw_only=True)
class QuantizationRecord:
    """What was quantized, and how near the result is."""

    choice: QuantizationChoice
    """Which parts are quantized, and in how many bits; of a job, what its first worker has chosen."""
    instructions: str
    """The instructions of this CPU for products of bytes, or the name of this GPU."""
    num_layers: Mapping[str, int]
    """Quantized layers by part: vision, qformer, language_projection, language_model."""
    num_eligible: Mapping[str, int]
    """All layers of these parts that can be quantized."""
    too_different: tuple[str, ...]
    """Layers that stay as they are, because their result would differ too much."""
    logits_error: float
    """Root mean square difference of the logits of built-in images, over the standard deviation of the
    logits of the unquantized model."""

    def summary(self) -> str:
        """Return one line for the log."""
        parts = (f"{p} {self.num_layers.get(p, 0)} of {n} layers" for p, n in self.num_eligible.items())
        return (
            f"{self.choice.method} ({self.instructions}, {self.choice.weight_bits}-bit weights): "
            f"{', '.join(parts)}; "
            f"logits of built-in images differ by {self.logits_error:.2g} standard deviations"
        )


@dataclass(frozen=True)
class Calibration:
    """What the pass runs on."""

    images: np.ndarray
    """uint8[B, S, S, 3]."""
    start_ids: list[int]
    """Token ids before a text."""

    @torch.inference_mode()
    def logits(self, model: Blip2) -> Tensor:
        """Return the logits of a text after each image: float32[B * U, V]."""
        images = torch.from_numpy(self.images).to(model.query_tokens.device)
        image_embeds = model.image_features(model.normalizer(images, model.dtype))
        prefixes = list(model.project(model.qformer_features(image_embeds)))
        ids = torch.tensor([*self.start_ids, *TEXT], device=images.device)
        ids %= model.config.text_config.vocab_size
        return torch.cat(model.language_model.predict(prefixes, [ids] * len(prefixes))).float()


@dataclass(eq=False)
class _Pending(QuantizedWeight):
    """A layer's weight that is not read yet; it is read, and quantized, when the layer is first used."""

    linear: Linear
    name: str
    read: Callable[[], None]
    norm: Norm | None
    store: StoreWeight
    too_different: list[str]

    def __call__(self, input: Tensor, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
        self.linear.quantized = None
        self.read()
        output = F.linear(input, self.linear.weight, bias)
        self._quantize(_some_rows(input))
        _release_freed_memory()
        return output if activation is None else activation(output)

    def _quantize(self, input: Tensor) -> None:
        weight = self.linear.weight.float()
        expected = F.linear(input, weight)
        plain = self.store(weight)
        found, error, factors = plain, _error(plain(input, None), expected), None
        if self.norm is not None:
            candidate = smoothing_factors(input, weight)
            smooth = self.store(weight * candidate)
            smooth_error = _error(smooth(input / candidate, None), expected)
            if smooth_error < error:
                found, error, factors = smooth, smooth_error, candidate
        logger.debug("%s: error %.4f, smoothed: %s", self.name, error, factors is not None)
        if not error <= MAX_LAYER_ERROR:
            self.too_different.append(self.name)
            return
        if self.norm is not None and factors is not None:
            divide(self.norm, factors)
        self.linear.take(found)


def quantize(
    model: Blip2,
    readers: dict[str, Callable[[], None]],
    choice: QuantizationChoice,
    calibration: Calibration,
) -> QuantizationRecord:
    """Read and quantize the layers whose weights are not read yet.

    Args:
        model: all its other weights are loaded.
        readers: fills the plain weight of each layer that is to be quantized, by the layer's name; emptied,
            because a reader holds the memory that it fills.
        choice: how they are quantized.
        calibration: what to run the model on.
    """
    norms, modules = preceding_norms(model), dict(model.named_modules())
    device = model.query_tokens.device
    store = storage(choice, device)
    too_different: list[str] = []
    while readers:
        name, read = readers.popitem()
        linear = modules[name]
        assert isinstance(linear, Linear)
        linear.quantized = _Pending(linear, name, read, norms.get(linear), store, too_different)
    expected = calibration.logits(model)
    fuse_activations(model)
    found = calibration.logits(model)
    layers = eligible(model)
    num_eligible = Counter(map(part_of, layers))
    num_quantized = Counter(part_of(name) for name, linear in layers.items() if linear.quantized is not None)
    if too_different:
        logger.warning(
            "Too different in %s, these layers stay as they are: %s", choice.method, ", ".join(too_different)
        )
    return QuantizationRecord(
        choice=choice,
        instructions=instructions(device),
        num_layers={part: num_quantized[part] for part in num_eligible},
        num_eligible=dict(num_eligible),
        too_different=tuple(too_different),
        logits_error=_logits_error(found, expected),
    )


def fuse_activations(model: nn.Module) -> None:
    """Move each activation whose only reader scales its rows into that reader.

    A layer in fp8 passes once over its input to scale the rows. If it computes the activation before it in
    the same pass, the result need not be written and read again.
    """
    for block in model.modules():
        if isinstance(block, VisionBlock | OptLayer | PostNormMlp):
            weight = block.fc2.quantized
            if isinstance(weight, RowScaledWeight):
                weight.input_activation = block.fc1.take_activation()


def _release_freed_memory() -> None:
    """Give the plain weights that have been freed back to the system.

    glibc keeps blocks of less than 32 MB for later, and most weights are that small.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _some_rows(input: Tensor) -> Tensor:
    """Return at most `CALIBRATION_ROWS` rows at equal distances: float[..., D] -> float32[M, D]."""
    rows = input.reshape(-1, input.shape[-1])
    return rows[:: -(-len(rows) // CALIBRATION_ROWS)].float()


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def _logits_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().mean().sqrt() / expected.std().clamp(min=1e-6))
