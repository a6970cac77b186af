"""The methods that `quantize` names: where each runs, and how it stores a weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from blip2_actor.models.layers import QuantizedWeight
from blip2_actor.quantization import int8
from blip2_actor.quantization.choice import QuantizationChoice

StoreWeight: TypeAlias = Callable[[Tensor], QuantizedWeight]
"""Turns float32[N, D] into a weight of fewer bits."""


def require_method(method: str, device: torch.device) -> None:
    """Raise ValueError unless a device computes in a method."""
    int8.require_int8(device)


def weight_bits(method: str, device: torch.device) -> int:
    """Return the bits of a weight: 7 if products of 8 bits are wrong on this CPU."""
    return 8 if int8.largest_weight() == int8.FULL_WEIGHT else 7


def instructions(device: torch.device) -> str:
    """Return the instruction set of a CPU for products of bytes, or the name of a GPU."""
    return int8.instructions()


def storage(choice: QuantizationChoice, device: torch.device) -> StoreWeight:
    """Return what stores a weight as chosen.

    Raises:
        ValueError: the choice is of a machine with other instructions, and products would be wrong here.
    """
    largest = int8.FULL_WEIGHT if choice.weight_bits == 8 else int8.HALF_WEIGHT
    if largest > int8.largest_weight():
        raise ValueError(
            f"quantize must use weights of 7 bits on a CPU with {instructions(device)}, where sums of larger "
            f"products are cut, but the job was begun in 8 bits ({choice.instructions}); use machines with "
            "VNNI, or begin a new output on this one"
        )
    return partial(int8.Int8Weight, largest=largest)
