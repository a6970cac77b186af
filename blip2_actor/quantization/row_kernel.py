"""Scaling the rows of an input to fp8 on a GPU, in one pass over memory.

torch's operations, one by one, take five passes, and longer than the product saves. A norm or an activation
before the scaling is computed in the same pass, in float32. This module imports triton, which torch's builds
for GPUs bring along.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FP8 = torch.float8_e4m3fn
MAX_WARPS = 4
"""2, 8 and 16 warps are slower for rows of 6,144 numbers on an H100."""
MIN_ROWS = 128
"""cuBLAS has no product with scales of rows for 3 rows of some shapes (2,560 x 10,240 on an H100), and takes
tiles of 128 rows in any case."""


def scale_rows_to_fp8(
    rows: Tensor,
    smallest: float,
    step: str | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Scale each row so that its largest magnitude is that of e4m3.

    Args:
        rows: float[M, D], the last axis contiguous.
        smallest: the least largest magnitude; a row of zeros has none of its own.
        step: what is computed first: "layer_norm", the name of an activation, or None.
        weight: float[D], of the norm.
        bias: float[D], of the norm.
        eps: of the norm.

    Returns:
        float8_e4m3fn[R, D], and the largest magnitude of each row, float32[R, 1]. R is M, but at least
        `MIN_ROWS`; the rows after the first M are undefined.
    """
    num_rows, width = rows.shape
    num_padded = max(num_rows, MIN_ROWS)
    levels = torch.empty(num_padded, width, dtype=FP8, device=rows.device)
    largest = torch.empty(num_padded, 1, dtype=torch.float32, device=rows.device)
    first = 1 << (width.bit_length() - 1)
    _scale_row[(num_rows,)](
        rows,
        levels,
        largest,
        rows if weight is None else weight,
        rows if bias is None else bias,
        rows.stride(0),
        smallest,
        eps,
        WIDTH=width,
        FIRST=first,
        REST=triton.next_power_of_2(max(1, width - first)),
        STEP=step or "",
        HAS_BIAS=bias is not None,
        LARGEST=torch.finfo(FP8).max,
        num_warps=min(MAX_WARPS, max(1, first // 512)),
    )
    return levels, largest


@triton.jit
def _scale_row(  # type: ignore[no-untyped-def]
    rows,
    levels,
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
    HAS_BIAS: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Scale one row.

    A block has a power of two of numbers, so a row is two blocks: 6,144 are 4,096 and 2,048.
    """
    row = tl.program_id(0).to(tl.int64)
    source, target = rows + row * row_stride, levels + row * WIDTH
    first, rest = tl.arange(0, FIRST), FIRST + tl.arange(0, REST)
    exists = rest < WIDTH
    x_first = tl.load(source + first).to(tl.float32)
    x_rest = tl.load(source + rest, mask=exists, other=0.0).to(tl.float32)
    if STEP == "layer_norm":
        mean = (tl.sum(x_first, axis=0) + tl.sum(x_rest, axis=0)) / WIDTH
        x_first, x_rest = x_first - mean, tl.where(exists, x_rest - mean, 0.0)
        variance = (tl.sum(x_first * x_first, axis=0) + tl.sum(x_rest * x_rest, axis=0)) / WIDTH
        factor = tl.rsqrt(variance + eps)
        x_first *= factor * tl.load(weight + first).to(tl.float32)
        x_rest *= factor * tl.load(weight + rest, mask=exists, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x_first += tl.load(bias + first).to(tl.float32)
            x_rest += tl.load(bias + rest, mask=exists, other=0.0).to(tl.float32)
    elif STEP != "":
        x_first, x_rest = _activate(x_first, STEP), _activate(x_rest, STEP)
    magnitude = tl.maximum(tl.max(tl.abs(x_first), axis=0), tl.max(tl.abs(x_rest), axis=0))
    magnitude = tl.maximum(magnitude, smallest)
    scale = LARGEST / magnitude  # a NaN stays one, and an infinity makes its row NaN
    tl.store(target + first, (x_first * scale).to(levels.dtype.element_ty))
    tl.store(target + rest, (x_rest * scale).to(levels.dtype.element_ty), mask=exists)
    tl.store(largest + row, magnitude)


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
