"""Scaling the rows of an input to fp8 on a GPU, in one pass over memory.

torch's operations, one by one, take five passes, and longer than the product saves. This module imports
triton, which torch's builds for GPUs bring along.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FP8 = torch.float8_e4m3fn


def scale_rows_to_fp8(rows: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    """Scale each row so that its largest magnitude is that of e4m3.

    Args:
        rows: float[M, D], the last axis contiguous.
        smallest: the least largest magnitude; a row of zeros has none of its own.

    Returns:
        float8_e4m3fn[M, D], and the largest magnitude of each row, float32[M, 1].
    """
    num_rows, width = rows.shape
    levels = torch.empty(rows.shape, dtype=FP8, device=rows.device)
    largest = torch.empty(num_rows, 1, dtype=torch.float32, device=rows.device)
    padded = triton.next_power_of_2(width)
    _scale_row[(num_rows,)](
        rows,
        levels,
        largest,
        rows.stride(0),
        smallest,
        WIDTH=width,
        WIDTH_PADDED=padded,
        LARGEST=torch.finfo(FP8).max,
        num_warps=min(8, max(1, padded // 512)),
    )
    return levels, largest


@triton.jit
def _scale_row(  # type: ignore[no-untyped-def]
    rows,
    levels,
    largest,
    row_stride,
    smallest,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    LARGEST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH_PADDED)
    exists = columns < WIDTH
    values = tl.load(rows + row * row_stride + columns, mask=exists, other=0.0).to(tl.float32)
    own_largest = tl.maximum(tl.max(tl.abs(values), axis=0), smallest)
    scaled = values * (LARGEST / own_largest)
    tl.store(levels + row * WIDTH + columns, scaled.to(levels.dtype.element_ty), mask=exists)
    tl.store(largest + row, own_largest)
