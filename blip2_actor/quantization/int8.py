"""A linear layer in int8 on a CPU: signed weights, and inputs that are quantized row by row at run time.

Each output channel of the weight has a scale, and so has each row of the input. The product sums integers, so
it is exact, and a row never depends on the rows next to it. oneDNN multiplies unsigned bytes with signed
ones; therefore an input in [-127, 127] is stored with 128 added (its zero point).

On a CPU without VNNI, such a product adds two neighbors in 16 bits, and saturates if the weights use all
eight bits: 2 * 255 * 127 exceeds 32767. With weights in [-63, 63] it cannot.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from blip2_actor.device import onednn_limit
from blip2_actor.models.layers import Activation, QuantizedWeight

LARGEST_INPUT = 127
ZERO_POINT = 128
FULL_WEIGHT, HALF_WEIGHT = 127, 63
"""Largest magnitude of a weight with eight and with seven bits."""
MAGIC = float(2**23 + ZERO_POINT)
"""Added to a float32 in [-127, 127], it leaves in the low byte the number rounded to an integer, plus 128."""
SMALLEST_SCALE = 1e-30
"""Instead of 0, for a channel whose weights are all zero."""
BLOCK_ELEMENTS = 1 << 18
"""Elements that several operations in a row take at once, so that they stay in the cache of a core.
Quantizing 2,056 x 3,072 then takes 0.4 of its time, and scaling with bias and gelu 0.65 (AVX512 core,
2026-11-26)."""


class Int8Weight(QuantizedWeight):
    """The weight of a linear layer in int8, packed for oneDNN."""

    def __init__(self, weight: Tensor, largest: int) -> None:
        """
        Args:
            weight: float32[N, D].
            largest: largest magnitude of a quantized weight, from `largest_weight`.
        """
        levels, scale = quantize_weight(weight, largest)
        self.scale = scale / LARGEST_INPUT
        self._packed = torch.ops.onednn.qlinear_prepack(levels, None)
        self._zero_points = torch.zeros(len(weight), dtype=torch.int32)
        self._magic = torch.full((weight.shape[1],), MAGIC)

    def __call__(self, input: Tensor, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
        """Multiply, add the bias, and apply the activation, all in float32."""
        rows = input.reshape(-1, input.shape[-1])
        levels, largest = quantize_rows(rows, self._magic)
        product = multiply(levels, self._packed, self.scale, self._zero_points)
        output = product if input.dtype is torch.float32 else torch.empty_like(product, dtype=input.dtype)
        bias = None if bias is None else bias.float()
        for found, factor, result in _blocks(product, largest, output):
            if bias is None:
                found.mul_(factor)
            else:
                torch.addcmul(bias, found, factor, out=found)
            if activation is not None:
                found = activation(found)
            if found.data_ptr() != result.data_ptr():
                result.copy_(found)
        return output.unflatten(0, input.shape[:-1])


def quantize_weight(weight: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Quantize each output channel by its largest magnitude.

    Args:
        weight: float32[N, D].
        largest: largest magnitude of the result.

    Returns:
        int8[N, D], and the scale of each channel, float32[N].
    """
    scale = weight.abs().amax(dim=1).clamp_(min=SMALLEST_SCALE) / largest
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def quantize_rows(rows: Tensor, magic: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row by its largest magnitude.

    The numbers are rounded by adding `MAGIC`, which takes a tenth of the time of rounding and converting
    (0.34 ns an element instead of 3.3; one AVX512 core, 2026-11-26). If a row holds NaN or an infinity, its
    largest magnitude is not finite, and so the product of this row is not either.

    Args:
        rows: float[M, D].
        magic: float32[D], each `MAGIC`; a vector, because adding a single number takes four times as long.

    Returns:
        uint8[M, D] with zero point `ZERO_POINT`, and the largest magnitude of each row, float32[M, 1].
    """
    levels = torch.empty(rows.shape, dtype=torch.uint8)
    largest = torch.empty(len(rows), 1)
    for of_rows, found, magnitude in _blocks(rows, levels, largest):
        of_rows = of_rows.float()
        high, low = of_rows.amax(dim=-1, keepdim=True), of_rows.amin(dim=-1, keepdim=True)
        torch.maximum(high, low.neg_(), out=magnitude)
        found.copy_(torch.addcmul(magic, of_rows, LARGEST_INPUT / magnitude).view(torch.int32))
    return levels, largest


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors of M rows alike, by the elements of a row of the first one."""
    num_rows = max(1, BLOCK_ELEMENTS // tensors[0].shape[1])
    if len(tensors[0]) <= num_rows:
        return iter((tensors,))
    return zip(*(tensor.split(num_rows) for tensor in tensors), strict=True)


def multiply(levels: Tensor, packed: Tensor, scale: Tensor, zero_points: Tensor) -> Tensor:
    """Multiply quantized rows with a packed weight: uint8[M, D] -> float32[M, N], scaled by channel."""
    return torch.ops.onednn.qlinear_pointwise(
        levels, 1.0, ZERO_POINT, packed, scale, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
    )


@cache
def largest_weight() -> int:
    """Return the largest magnitude of a weight with which a product does not saturate on this CPU.

    It compares products of full range with an exact reference, so it finds what the CPU does, not what it
    says about itself.
    """
    return FULL_WEIGHT if is_exact(FULL_WEIGHT) else HALF_WEIGHT


def is_exact(largest: int) -> bool:
    """Return whether products of full-range inputs with weights of this magnitude equal an integer product.

    Rows and channels hold the extremes in all combinations of sign, also those that cancel out. Shapes are
    those of one row, of a few, and of more than one block of a kernel.
    """
    generator = torch.Generator().manual_seed(0)
    for num_rows, width, num_channels in ((1, 64, 48), (5, 256, 64), (70, 512, 96)):
        signs = torch.randint(0, 2, (num_rows + num_channels, width), generator=generator) * 2 - 1
        signs[0], signs[num_rows] = 1, 1  # the largest sum of all
        levels = torch.where(signs[:num_rows] > 0, 2 * ZERO_POINT - 1, 0)
        weight = signs[num_rows:] * largest
        expected = (levels - ZERO_POINT) @ weight.T
        found = multiply(
            levels.to(torch.uint8),
            torch.ops.onednn.qlinear_prepack(weight.to(torch.int8), None),
            torch.ones(num_channels),
            torch.zeros(num_channels, dtype=torch.int32),
        )
        if not torch.equal(found.long(), expected):
            return False
    return True


def instructions() -> str:
    """Return the instruction set of int8 products on this CPU, such as "AVX512 VNNI" or "AVX2".

    `ONEDNN_MAX_CPU_ISA`, which limits oneDNN to older instructions, is named if it is set.
    """
    if limit := onednn_limit():
        return f"{limit} (ONEDNN_MAX_CPU_ISA)"
    capability = torch.backends.cpu.get_cpu_capability()
    if torch.cpu._is_amx_tile_supported():
        return f"{capability} AMX"
    return f"{capability} VNNI" if torch.cpu._is_vnni_supported() else capability
