"""A linear layer whose weight alone is in int8, for memory; inputs and products are in the engine's dtype.

Before it multiplies, a block of output channels becomes numbers of that dtype. A block is small, so that it
stays in the cache of a CPU, and memory holds no plain weight.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from blip2_actor.models.layers import Activation, QuantizedWeight
from blip2_actor.quantization.int8 import FULL_WEIGHT, quantize_weight

BLOCK_ELEMENTS = 256 * 2560
"""Elements of one block: of 64 to 512 channels of 2,560, 256 was fastest. A layer then takes 1.3 times the
time of a packed plain one for 64 rows in bfloat16, 2.1 times for one row (AVX512-BF16 core, 2026-11-26)."""


class Int8StoredWeight(QuantizedWeight):
    """The weight of a linear layer in int8, with a scale for each output channel."""

    def __init__(self, weight: Tensor) -> None:
        """
        Args:
            weight: float32[N, D].
        """
        self._levels, self._scale = quantize_weight(weight, FULL_WEIGHT)
        self._block_channels = max(1, BLOCK_ELEMENTS // weight.shape[1])

    def __call__(self, input: Tensor, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
        """Multiply, add the bias, and apply the activation."""
        scale = self._scale.to(input.dtype)
        if input.dtype is torch.float16:  # sums of unscaled levels would exceed its range
            output = F.linear(input, self._levels * scale[:, None], bias)
        else:
            blocks = self._levels.split(self._block_channels)
            output = torch.cat([F.linear(input, block.to(input.dtype)) for block in blocks], dim=-1)
            output = output.mul_(scale) if bias is None else torch.addcmul(bias, output, scale)
        return output if activation is None else activation(output)
