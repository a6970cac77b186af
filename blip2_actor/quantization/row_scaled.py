"""A linear layer in int8 or fp8 on a GPU, by torch's own products of matrices of bytes.

Each output channel of the weight has a scale, and so has each row of the input, found at run time. In fp8
from bfloat16, one kernel scales the rows, and the product applies both scales; the kernel also computes the
norm or the activation before the layer (`fusing.py`). Every other product is unscaled, in int32 or float32,
and the scales are applied after it; `torch.compile` fuses what stands before and after it. Those products
also run on a CPU, slowly, so that tests need no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from blip2_actor.device import find_kernel
from blip2_actor.models.layers import Activation, find_activation
from blip2_actor.quantization.int8 import FULL_WEIGHT, SMALLEST_SCALE

FP8 = torch.float8_e4m3fn
LARGEST = {torch.int8: float(FULL_WEIGHT), FP8: torch.finfo(FP8).max}
"""Largest magnitude of a number in each dtype."""
MULTIPLE, MIN_ROWS = 16, 32
"""cuBLAS multiplies matrices whose sides are multiples of 16, and in int8 of more than 16 rows."""
LAYER_NORM = "layer_norm"
_KERNEL_STEPS = {
    LAYER_NORM: LAYER_NORM,
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""Our names of steps, and those of the kernel."""


@dataclass(frozen=True)
class InputStep:
    """What is computed of the input of a layer before its rows are scaled."""

    name: str
    """`LAYER_NORM` or the name of an activation."""
    weight: Tensor | None = None
    """float[D], of the norm."""
    bias: Tensor | None = None
    """float[D], of the norm."""
    eps: float = 0.0

    def __call__(self, rows: Tensor) -> Tensor:
        """float[M, D] -> float[M, D], by torch."""
        if self.name == LAYER_NORM:
            return F.layer_norm(rows, rows.shape[-1:], self.weight, self.bias, self.eps)
        return find_activation(self.name)(rows)


class RowScaledWeight:
    """The weight of a linear layer in int8 or fp8 (e4m3), padded with zeros for the product."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        """
        Args:
            weight: float32[N, D].
            dtype: torch.int8 or `FP8`.
        """
        self._dtype, self._num_channels = dtype, len(weight)
        levels, largest = scale_rows(weight, dtype)
        self._scale = largest.flatten() / LARGEST[dtype] ** 2  # times the largest magnitude of a row
        self._levels = _padded(levels, len(weight))
        self._one = torch.ones((), device=weight.device)
        fits = dtype is FP8 and self._levels.shape == weight.shape
        self._kernel = _find_kernel(weight.device) if fits else None
        """Scales rows in bfloat16, whose product applies the scales itself and writes half as much."""
        self.input_step: InputStep | None = None
        """Computed before the rows are scaled."""

    def __call__(self, input: Tensor, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
        """Compute the input step, multiply, add the bias, and apply the activation.

        float[..., D] -> float[..., N], in the dtype of `input`.
        """
        rows, step = input.reshape(-1, input.shape[-1]), self.input_step
        if self._kernel is not None and input.dtype is torch.bfloat16:
            levels, largest = self._kernel(rows, step)
            output = _multiply_scaled(levels, self._levels, largest, self._scale, bias)[: len(rows)]
        else:
            rows = rows if step is None else step(rows)
            levels, largest = scale_rows(rows, self._dtype)
            product = self._multiply(_padded(levels, max(len(rows), MIN_ROWS)))
            output = product[: len(rows), : self._num_channels] * (largest * self._scale)
            if bias is not None:
                output = output + bias
        output = output.to(input.dtype).unflatten(0, input.shape[:-1])
        return output if activation is None else activation(output)

    def _multiply(self, levels: Tensor) -> Tensor:
        """[M, D] of bytes -> int32[M, N] or float32[M, N], with padded sides."""
        if self._dtype is torch.int8:
            return torch._int_mm(levels, self._levels.T)
        return torch._scaled_mm(
            levels, self._levels.T, scale_a=self._one, scale_b=self._one, out_dtype=torch.float32
        )


def _multiply_scaled(
    rows: Tensor, channels: Tensor, of_rows: Tensor, of_channels: Tensor, bias: Tensor | None
) -> Tensor:
    """Multiply, apply the scales and add the bias in one operation.

    fp8[M, D], fp8[N, D], float32[M, 1], float32[N] -> bfloat16[M, N].
    """
    return torch._scaled_mm(
        rows,
        channels.T,
        scale_a=of_rows,
        scale_b=of_channels[None],
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


ScaleRows = Callable[[Tensor, "InputStep | None"], tuple[Tensor, Tensor]]


@cache
def _find_kernel(device: torch.device) -> ScaleRows | None:
    def load() -> ScaleRows:
        from blip2_actor.quantization.row_kernel import scale_rows_to_fp8

        def scale(rows: Tensor, step: InputStep | None) -> tuple[Tensor, Tensor]:
            if step is None:
                return scale_rows_to_fp8(rows, SMALLEST_SCALE)
            name = _KERNEL_STEPS[step.name]
            return scale_rows_to_fp8(rows, SMALLEST_SCALE, name, step.weight, step.bias, step.eps)

        ones = torch.ones(16, 16, device=device, dtype=torch.bfloat16)
        for name in _KERNEL_STEPS:
            scale(ones, InputStep(name, ones[0], ones[0]))
        levels, largest = scale(ones, None)
        _multiply_scaled(levels, levels, largest, largest.flatten(), None)
        return scale

    return find_kernel(device, "Quantizing inputs", load)


def scale_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale each row so that its largest magnitude is that of the dtype.

    If a row holds NaN or an infinity, its largest magnitude is not finite, and so the product of this row is
    not either.

    Args:
        rows: float[M, D].
        dtype: torch.int8 or `FP8`.

    Returns:
        [M, D] in `dtype`, and the largest magnitude of each row, float32[M, 1].
    """
    largest = rows.abs().amax(dim=-1, keepdim=True).float().clamp(min=SMALLEST_SCALE)
    scaled = rows.float() * (LARGEST[dtype] / largest)
    return (scaled.round() if dtype is torch.int8 else scaled).to(dtype), largest


def _padded(levels: Tensor, num_rows: int) -> Tensor:
    """Append zeros, so that there are at least `num_rows` rows and both sides are multiples of `MULTIPLE`."""
    rows, columns = levels.shape
    more = (-columns % MULTIPLE, num_rows - rows + -num_rows % MULTIPLE)
    if not any(more):
        return levels
    return F.pad(levels.view(torch.uint8), (0, more[0], 0, more[1])).view(
        levels.dtype
    )  # zero is zero in both
