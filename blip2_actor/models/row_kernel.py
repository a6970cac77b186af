"""Process each row between two matrix products on a GPU, in one pass over memory.

The result of the layer before is added to the residual stream, the sum is normalized, and its rows are scaled
to fp8 if the next layer multiplies in fp8; or an activation is computed, and its rows are scaled. Each is
computed in float32. torch's operations, one by one, take up to five passes. This module imports triton, which
torch's builds for GPUs bring along.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

FP8 = torch.float8_e4m3fn
MAX_WARPS = 4
"""2, 8 and 16 warps are slower for rows of 6,144 numbers on an H100; 1, 2 and 4 are alike for 1,408."""
MIN_ROWS = 128
"""cuBLAS has no product with scales of rows for 3 rows of some shapes (2,560 x 10,240 on an H100), and takes
tiles of 128 rows in any case."""


Norm: TypeAlias = tuple[Tensor, Tensor | None, float]
"""Weight float[D], bias float[D] or None, and epsilon of a layer norm."""


def add_and_norm(rows: Tensor, update: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Add two matrices, and normalize the rows of the sum.

    float[M, D] each, contiguous -> the sum and its norm, float[M, D] each, in the dtype of `rows`.
    """
    total, normed = torch.empty_like(rows), torch.empty_like(rows)
    _launch(rows, total, normed, update=update, norm=norm)
    return total, normed


def add_norm_and_scale(
    rows: Tensor, update: Tensor | None, norm: Norm, smallest: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Add two matrices unless there is one, normalize the rows of the sum, and scale them to fp8.

    Args:
        rows: float[M, D], contiguous.
        update: float[M, D], contiguous, or None.
        norm: of the rows.
        smallest: as in `scale_rows_to_fp8`.

    Returns:
        The sum, float[M, D], and what `scale_rows_to_fp8` returns.
    """
    total = rows if update is None else torch.empty_like(rows)
    levels, largest = _empty_levels(rows)
    _launch(rows, total, levels, largest, smallest, update=update, norm=norm)
    return total, levels, largest


def scale_rows_to_fp8(rows: Tensor, smallest: float, activation: str = "") -> tuple[Tensor, Tensor]:
    """Compute an activation, and scale each row so that its largest magnitude is that of e4m3.

    Args:
        rows: float[M, D], the last axis contiguous.
        smallest: the least largest magnitude; a row of zeros has none of its own.
        activation: "relu", "gelu", "gelu_tanh", or "" for none.

    Returns:
        float8_e4m3fn[R, D], and the largest magnitude of each row, float32[R, 1]. R is M, but at least
        `MIN_ROWS`; the rows after the first M are undefined.
    """
    levels, largest = _empty_levels(rows)
    _launch(rows, rows, levels, largest, smallest, step=activation)
    return levels, largest


def _empty_levels(rows: Tensor) -> tuple[Tensor, Tensor]:
    num_padded = max(len(rows), MIN_ROWS)
    levels = torch.empty(num_padded, rows.shape[1], dtype=FP8, device=rows.device)
    return levels, torch.empty(num_padded, 1, dtype=torch.float32, device=rows.device)


def _launch(
    rows: Tensor,
    total: Tensor,
    result: Tensor,
    largest: Tensor | None = None,
    smallest: float = 0.0,
    *,
    update: Tensor | None = None,
    norm: Norm | None = None,
    step: str = "",
) -> None:
    """Run the kernel; the rows are scaled if there is `largest`."""
    num_rows, width = rows.shape
    first = 1 << (width.bit_length() - 1)
    weight, bias, eps = norm or (None, None, 0.0)
    _process_row[(num_rows,)](
        rows,
        rows if update is None else update,
        total,
        result,
        result if largest is None else largest,
        rows if weight is None else weight,
        rows if bias is None else bias,
        rows.stride(0),
        smallest,
        eps,
        WIDTH=width,
        FIRST=first,
        REST=triton.next_power_of_2(max(1, width - first)),
        STEP="layer_norm" if norm else step,
        HAS_UPDATE=update is not None,
        HAS_BIAS=bias is not None,
        IS_SCALED=largest is not None,
        LARGEST=torch.finfo(FP8).max,
        num_warps=min(MAX_WARPS, max(1, first // 512)),
    )


@triton.jit
def _process_row(  # type: ignore[no-untyped-def]
    rows,
    update,
    total,
    result,
    largest,
    weight,
    bias,
    row_stride,
    smallest,
    eps,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    STEP: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_SCALED: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Process one row.

    A block has a power of two of numbers, so a row is two blocks: 6,144 are 4,096 and 2,048.
    """
    row = tl.program_id(0).to(tl.int64)
    first, rest = tl.arange(0, FIRST), FIRST + tl.arange(0, REST)
    exists = rest < WIDTH
    x_first, x_rest = _read(rows + row * row_stride, first, rest, exists)
    if HAS_UPDATE:
        update_first, update_rest = _read(update + row * WIDTH, first, rest, exists)
        x_first += update_first
        x_rest += update_rest
        _write(total + row * WIDTH, first, rest, exists, x_first, x_rest)
        x_first = x_first.to(rows.dtype.element_ty).to(tl.float32)  # as torch rounds the sum
        x_rest = x_rest.to(rows.dtype.element_ty).to(tl.float32)
    if STEP == "layer_norm":
        mean = (tl.sum(x_first, axis=0) + tl.sum(x_rest, axis=0)) / WIDTH
        x_first, x_rest = x_first - mean, tl.where(exists, x_rest - mean, 0.0)
        variance = (tl.sum(x_first * x_first, axis=0) + tl.sum(x_rest * x_rest, axis=0)) / WIDTH
        factor = tl.rsqrt(variance + eps)
        weight_first, weight_rest = _read(weight, first, rest, exists)
        x_first *= factor * weight_first
        x_rest *= factor * weight_rest
        if HAS_BIAS:
            bias_first, bias_rest = _read(bias, first, rest, exists)
            x_first += bias_first
            x_rest += bias_rest
    elif STEP != "":
        x_first, x_rest = _activate(x_first, STEP), _activate(x_rest, STEP)
    if IS_SCALED:
        magnitude = tl.maximum(tl.max(tl.abs(x_first), axis=0), tl.max(tl.abs(x_rest), axis=0))
        magnitude = tl.maximum(magnitude, smallest)
        scale = LARGEST / magnitude  # a NaN stays one, and an infinity makes its row NaN
        x_first, x_rest = x_first * scale, x_rest * scale
        tl.store(largest + row, magnitude)
    _write(result + row * WIDTH, first, rest, exists, x_first, x_rest)


@triton.jit
def _read(row, first, rest, exists):  # type: ignore[no-untyped-def]
    """Return both blocks of a row in float32, with zeros behind its end."""
    return tl.load(row + first).to(tl.float32), tl.load(row + rest, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _write(row, first, rest, exists, x_first, x_rest):  # type: ignore[no-untyped-def]
    tl.store(row + first, x_first.to(row.dtype.element_ty))
    tl.store(row + rest, x_rest.to(row.dtype.element_ty), mask=exists)


@triton.jit
def _activate(x, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the activation.

    The error function is that of Abramowitz and Stegun, 7.1.26, which is off by at most 1.5e-7.
    """
    if STEP == "relu":
        y = tl.where(x < 0.0, 0.0, x)  # a NaN stays one
    elif STEP == "gelu":
        z = tl.abs(x) * 0.7071067811865476
        t = 1.0 / (1.0 + 0.3275911 * z)
        polynomial = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
        polynomial = t * (0.254829592 + t * (-0.284496736 + t * polynomial))
        y = tl.maximum(x, 0.0) - 0.5 * tl.abs(x) * polynomial * tl.exp(-z * z)
    else:
        tl.static_assert(STEP == "gelu_tanh")
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return y
