"""A linear layer in int8 or fp8 on a GPU, by torch's own products of matrices of bytes.

Each output channel of the weight has a scale, and so has each row of the input, found at run time. In fp8
from bfloat16, one kernel scales the rows, and the product applies both scales; the kernel also computes the
norm before the layer (`multiply_norm`) or the activation (`fuse_activations`). Every other product is
unscaled, in int32 or float32, and the scales are applied after it; `torch.compile` fuses what stands before
and after it. Those products also run on a CPU, slowly, so that tests need no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip2_actor.device import find_kernel
from blip2_actor.models.layers import ACTIVATIONS, Activation, QuantizedWeight
from blip2_actor.quantization.int8 import FULL_WEIGHT, SMALLEST_SCALE

FP8 = torch.float8_e4m3fn
LARGEST = {torch.int8: float(FULL_WEIGHT), FP8: torch.finfo(FP8).max}
"""Largest magnitude of a number in each dtype."""
MULTIPLE, MIN_ROWS = 16, 32
"""cuBLAS multiplies matrices whose sides are multiples of 16, and in int8 of more than 16 rows."""
_KERNEL_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""Our names of activations, and those of the kernel."""


class RowScaledWeight(QuantizedWeight):
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
        self._kernels = _find_kernels(weight.device) if fits else None
        """Scale rows in bfloat16, whose product applies the scales itself and writes half as much."""
        self.input_activation: str | None = None
        """Computed before the rows are scaled."""

    def __call__(self, input: Tensor, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
        """Compute the input's activation, multiply, add the bias, and apply the activation."""
        rows, name = input.reshape(-1, input.shape[-1]), self.input_activation
        if self._kernels is not None and input.dtype is torch.bfloat16:
            levels, largest = self._kernels.scale(
                rows, SMALLEST_SCALE, _KERNEL_ACTIVATIONS[name] if name else ""
            )
            output = _multiply_scaled(levels, self._levels, largest, self._scale, bias)[: len(rows)]
        else:
            rows = rows if name is None else ACTIVATIONS[name](rows)
            levels, largest = scale_rows(rows, self._dtype)
            product = self._multiply(_padded(levels, max(len(rows), MIN_ROWS)))
            output = product[: len(rows), : self._num_channels] * (largest * self._scale)
            if bias is not None:
                output = output + bias
        output = output.to(input.dtype).unflatten(0, input.shape[:-1])
        return output if activation is None else activation(output)

    def multiply_norm(
        self, hidden: Tensor, update: Tensor | None, norm: nn.LayerNorm, bias: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Add, normalize and scale in one kernel, and multiply; None without this kernel."""
        if self._kernels is None or hidden.dtype is not torch.bfloat16:
            return None
        rows = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        total, levels, largest = self._kernels.add_norm_and_scale(
            rows,
            None if update is None else update.reshape(rows.shape).contiguous(),
            (norm.weight, norm.bias, norm.eps),
            SMALLEST_SCALE,
        )
        output = _multiply_scaled(levels, self._levels, largest, self._scale, bias)[: len(rows)]
        return total.view(hidden.shape), output.unflatten(0, hidden.shape[:-1])

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


class Kernels(NamedTuple):
    """The kernels of `row_kernel.py`, which import triton."""

    scale: Callable[[Tensor, float, str], tuple[Tensor, Tensor]]
    add_norm_and_scale: Callable[
        [Tensor, Tensor | None, tuple[Tensor, Tensor | None, float], float], tuple[Tensor, Tensor, Tensor]
    ]


@cache
def _find_kernels(device: torch.device) -> Kernels | None:
    def load() -> Kernels:
        from blip2_actor.models.row_kernel import add_norm_and_scale, scale_rows_to_fp8

        ones = torch.ones(16, 16, device=device, dtype=torch.bfloat16)
        for name in sorted({"", *_KERNEL_ACTIVATIONS.values()}):
            levels, largest = scale_rows_to_fp8(ones, SMALLEST_SCALE, name)
        for update in (None, ones):
            add_norm_and_scale(ones, update, (ones[0], ones[0], 1e-5), SMALLEST_SCALE)
        _multiply_scaled(levels, levels, largest, largest.flatten(), None)
        return Kernels(scale_rows_to_fp8, add_norm_and_scale)

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
