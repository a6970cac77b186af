"""The methods that `quantize` names: where each runs, and how it stores a weight.

| method | weight | input | product | where |
|---|---|---|---|---|
| int8 | int8, a scale per output channel | int8, a scale per row | of bytes | CPU (oneDNN), CUDA |
| fp8 | e4m3, a scale per output channel | e4m3, a scale per row | of bytes | CUDA |
| int8-weights | int8, a scale per output channel | engine's dtype | engine's dtype | CPU, CUDA |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from blip2_actor.models.layers import QuantizedWeight
from blip2_actor.quantization import int8, row_scaled
from blip2_actor.quantization.choice import PARTS, QuantizationChoice
from blip2_actor.quantization.row_scaled import RowScaledWeight
from blip2_actor.quantization.weight_only import Int8StoredWeight

INT8, FP8, INT8_WEIGHTS = "int8", "fp8", "int8-weights"
StoreWeight: TypeAlias = Callable[[Tensor], QuantizedWeight]
"""Turns float32[N, D] into a weight of fewer bits."""
MIN_CAPABILITY = {INT8: (7, 5), FP8: (8, 9)}
"""The compute capability from which NVIDIA's GPUs multiply such numbers."""
ENCODERS = ("vision", "qformer", "language_projection")
"""What a GPU quantizes of every model: the parts that have many rows."""


def require_method(method: str, device: torch.device) -> None:
    """Raise ValueError unless a device computes in a method."""
    if method == INT8_WEIGHTS:
        return
    if device.type == "cpu":
        if method == FP8:
            raise ValueError("quantize must be int8 or int8-weights on a CPU, got fp8; give --quantize int8")
        if not torch.backends.mkldnn.is_available():
            raise ValueError(
                "quantize must be left out with this torch build, which lacks oneDNN (mkldnn), got int8; "
                "install torch from its package index"
            )
        return
    if torch.version.cuda is None:
        raise ValueError(f"quantize must be int8-weights on {device} with ROCm, got {method}; leave it out")
    found, needed = torch.cuda.get_device_capability(device), MIN_CAPABILITY[method]
    if found < needed:
        wanted, has = (".".join(map(str, capability)) for capability in (needed, found))
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"quantize must be int8-weights or left out on {name}, got {method}; it needs compute "
            f"capability {wanted}, and this GPU has {has}"
        )


def fixed_parts(method: str, device: torch.device, language_model: str) -> tuple[str, ...] | None:
    """Return the parts that a method quantizes whatever their speed; None if a measurement decides.

    A GPU also quantizes OPT in fp8. In int8, scaling the few rows of a decode step would take as long as the
    product saves. T5 does not divide its attention scores, so that the rounding of fp8 grows: the logits of
    random models differ by 0.28 standard deviations, more than the self-test admits.

    Args:
        language_model: model type of the language model: opt or t5.
    """
    if method == INT8_WEIGHTS:
        return ("language_model",)
    if device.type == "cpu":
        return None
    return PARTS if method == FP8 and language_model == "opt" else ENCODERS


def fuses(method: str | None, dtype: torch.dtype) -> bool:
    """Return whether compiling saves passes over memory: where no kernel scales the inputs on a GPU."""
    return method == INT8 or (method == FP8 and dtype is not torch.bfloat16)


def weight_bits(method: str, device: torch.device) -> int:
    """Return the bits of a weight: 7 if products of 8 bits are wrong on this CPU."""
    saturates = method == INT8 and device.type == "cpu" and int8.largest_weight() < int8.FULL_WEIGHT
    return 7 if saturates else 8


def instructions(device: torch.device) -> str:
    """Return the instruction set of a CPU for products of bytes, or the name of a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else int8.instructions()


def storage(choice: QuantizationChoice, device: torch.device) -> StoreWeight:
    """Return what stores a weight as chosen.

    Raises:
        ValueError: the choice is of a machine with other instructions, and products would be wrong here.
    """
    if choice.method == INT8_WEIGHTS:
        return Int8StoredWeight
    if choice.method == FP8:
        return partial(RowScaledWeight, dtype=row_scaled.FP8)
    if device.type != "cpu":
        return partial(RowScaledWeight, dtype=torch.int8)
    largest = int8.FULL_WEIGHT if choice.weight_bits == 8 else int8.HALF_WEIGHT
    if largest > int8.largest_weight():
        raise ValueError(
            f"quantize must use weights of 7 bits on a CPU with {instructions(device)}, where sums of larger "
            f"products are cut, but the job was begun in 8 bits ({choice.instructions}); use machines with "
            "VNNI, or begin a new output on this one"
        )
    return partial(int8.Int8Weight, largest=largest)
