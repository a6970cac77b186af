"""Self-attention of the vision encoder on a GPU, without a mask.

The number of positions is one more than a square, such as 257. torch's kernels work in blocks of 64 or 128
positions, and compute half as much again. Here the queries and the keys that are left over are small blocks
of their own. Scores and sums are float32.

On an H100 (64 images of 257 positions, 16 heads of 88, bfloat16, 2026-11-27) it takes 144 us, torch's flash
attention 197 us. If the last program also computes the queries left over, or if one program computes all
queries of a head, it is slower (152 and 165 us at best).

This module imports triton, which torch's builds for GPUs bring along. Axis letters: `blip2.py`.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

QUERIES, KEYS, NUM_STAGES, NUM_WARPS = 128, 64, 3, 8
"""Queries of a program, keys at once, and blocks of keys on their way: the fastest on an H100."""
MAX_REGISTERS = 128
"""With more registers for each thread, one program instead of two would run on a multiprocessor."""
MIN_SIDE = 16
"""Least side of a matrix product."""


def encoder_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Compute the attention of all positions of each image to each other.

    Args:
        qkv: float[B, P, 3 D], queries, keys and values; contiguous.
        num_heads: H.

    Returns:
        float[B, P, D], in the dtype of `qkv`.
    """
    num_images, num_positions, width = qkv.shape
    head_width = width // 3 // num_heads
    output = qkv.new_empty(num_images, num_positions, width // 3)
    first = max(MIN_SIDE, 1 << (head_width.bit_length() - 1))
    _attend_all[(triton.cdiv(num_positions, QUERIES), num_heads, num_images)](
        qkv,
        output,
        head_width**-0.5 * math.log2(math.e),
        NUM_HEADS=num_heads,
        WIDTH=head_width,
        FIRST=first,
        REST=max(MIN_SIDE, triton.next_power_of_2(max(1, head_width - first))),
        POSITIONS=num_positions,
        QUERIES=QUERIES,
        LAST_QUERIES=_side(num_positions % QUERIES),
        KEYS=KEYS,
        LAST_KEYS=_side(num_positions % KEYS),
        STAGES=NUM_STAGES,
        num_warps=NUM_WARPS,
        maxnreg=MAX_REGISTERS,
    )
    return output


def _side(count: int) -> int:
    """Return the side of the block for a number of positions that are left over."""
    return max(MIN_SIDE, triton.next_power_of_2(count)) if count else 0


@triton.jit
def _attend_all(  # type: ignore[no-untyped-def]
    qkv,
    output,
    scale,
    NUM_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    POSITIONS: tl.constexpr,
    QUERIES: tl.constexpr,
    LAST_QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    LAST_KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute one head of one image for a block of queries, of which the last one is smaller."""
    block, head, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    ALL: tl.constexpr = NUM_HEADS * WIDTH
    keys = qkv + image * (3 * POSITIONS * ALL) + ALL + head * WIDTH
    target = output + image * (POSITIONS * ALL) + head * WIDTH
    row = block * QUERIES
    if LAST_QUERIES == 0 or block < POSITIONS // QUERIES:
        _attend_block(
            keys, target, scale, row, ALL, WIDTH, FIRST, REST, 0, QUERIES, POSITIONS, KEYS, LAST_KEYS, STAGES
        )
    else:
        _attend_block(
            keys,
            target,
            scale,
            row,
            ALL,
            WIDTH,
            FIRST,
            REST,
            POSITIONS,
            LAST_QUERIES,
            POSITIONS,
            KEYS,
            LAST_KEYS,
            STAGES,
        )


@triton.jit
def _attend_block(  # type: ignore[no-untyped-def]
    keys,
    target,
    scale,
    row,
    ALL: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    END: tl.constexpr,
    QUERIES: tl.constexpr,
    POSITIONS: tl.constexpr,
    KEYS: tl.constexpr,
    LAST_KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Go through the keys, `KEYS` at a time, with a running maximum; queries from `END` on do not exist."""
    FULL: tl.constexpr = POSITIONS // KEYS * KEYS
    values = keys + ALL
    rows = row + tl.arange(0, QUERIES)
    query, query_b = _load(keys - ALL, rows, ALL, WIDTH, FIRST, REST, END)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sum, sum_b = tl.zeros([QUERIES, FIRST], tl.float32), tl.zeros([QUERIES, REST], tl.float32)
    for start in tl.range(0, FULL, KEYS, num_stages=STAGES):
        at = start + tl.arange(0, KEYS)
        key, key_b = _load(keys, at, ALL, WIDTH, FIRST, REST, 0)
        value, value_b = _load(values, at, ALL, WIDTH, FIRST, REST, 0)
        score = _score(query, query_b, key, key_b, scale, FIRST < WIDTH)
        largest, total, sum, sum_b = _add(score, value, value_b, largest, total, sum, sum_b, FIRST < WIDTH)
    if LAST_KEYS > 0:
        last = FULL + tl.arange(0, LAST_KEYS)
        last_key, last_key_b = _load(keys, last, ALL, WIDTH, FIRST, REST, POSITIONS)
        last_value, last_value_b = _load(values, last, ALL, WIDTH, FIRST, REST, POSITIONS)
        last_score = _score(query, query_b, last_key, last_key_b, scale, FIRST < WIDTH)
        last_score = tl.where((last < POSITIONS)[None, :], last_score, float("-inf"))
        largest, total, sum, sum_b = _add(
            last_score, last_value, last_value_b, largest, total, sum, sum_b, FIRST < WIDTH
        )
    _store(target, rows, sum / total[:, None], sum_b / total[:, None], ALL, WIDTH, FIRST, REST, END)


@triton.jit
def _load(  # type: ignore[no-untyped-def]
    source,
    rows,
    ALL: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    END: tl.constexpr,
):
    """Return both blocks of channels of some rows, with zeros where there are none."""
    start = source + rows[:, None] * (3 * ALL)
    first, rest, is_first, is_rest = _channels(rows, WIDTH, FIRST, REST, END)
    x = tl.load(start + first, mask=is_first, other=0.0)
    y = x
    if FIRST < WIDTH:
        y = tl.load(start + rest, mask=is_rest, other=0.0)
    return x, y


@triton.jit
def _channels(  # type: ignore[no-untyped-def]
    rows, WIDTH: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, END: tl.constexpr
):
    """Return two blocks of channels, and which of them exist in which row; with 0 for `END` all rows do.

    A block has a power of two of channels, so the channels of a head are two blocks: 88 are 64 and 32, of
    which 8 are zeros.
    """
    first, rest = tl.arange(0, FIRST)[None, :], (FIRST + tl.arange(0, REST))[None, :]
    is_first, is_rest = first < WIDTH, rest < WIDTH
    if END > 0:
        is_first, is_rest = is_first & (rows < END)[:, None], is_rest & (rows < END)[:, None]
    return first, rest, is_first, is_rest


@triton.jit
def _score(query, query_b, key, key_b, scale, HAS_REST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return scores whose powers of two are the weights before they are normalized."""
    score = tl.dot(query, tl.trans(key))
    if HAS_REST:
        score = tl.dot(query_b, tl.trans(key_b), score)
    return score * scale


@triton.jit
def _add(  # type: ignore[no-untyped-def]
    score, value, value_b, largest, total, sum, sum_b, HAS_REST: tl.constexpr
):
    """Add keys with their values to the running maximum, the total of the weights, and the weighted sums."""
    new_largest = tl.maximum(largest, tl.max(score, axis=1))
    weight = tl.exp2(score - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    total = total * shrink + tl.sum(weight, axis=1)
    weight = weight.to(value.dtype)
    sum = tl.dot(weight, value, sum * shrink[:, None])
    if HAS_REST:
        sum_b = tl.dot(weight, value_b, sum_b * shrink[:, None])
    return new_largest, total, sum, sum_b


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    target,
    rows,
    x,
    y,
    ALL: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    END: tl.constexpr,
):
    start = target + rows[:, None] * ALL
    first, rest, is_first, is_rest = _channels(rows, WIDTH, FIRST, REST, END)
    tl.store(start + first, x.to(target.dtype.element_ty), mask=is_first)
    if FIRST < WIDTH:
        tl.store(start + rest, y.to(target.dtype.element_ty), mask=is_rest)
