"""Each kernel against its formula in float64.

The interpreter computes products of bfloat16 wrongly and truncates to fp8, so bfloat16 needs a GPU, and fp8
has a tolerance of its own without one.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from blip2_actor.models.decode_attention import decode_attention
from blip2_actor.models.encoder_attention import encoder_attention
from blip2_actor.models.row_kernel import FP8, add_and_norm, add_norm_and_scale, scale_rows_to_fp8

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
TOLERANCES = {torch.float32: 1e-5, torch.float16: 3e-3} | ({torch.bfloat16: 1e-2} if HAS_GPU else {})
HALF = [dtype for dtype in TOLERANCES if dtype is not torch.float32]
FP8_ERROR = 0.04 if HAS_GPU else 0.08
"""Root mean square of the rounding errors, relative to that of the numbers."""


def assert_near(found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCES[found.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("num_positions", [257, 256, 145, 577, 197, 17])
@pytest.mark.parametrize("width", [88, 64, 24])
def test_every_position_attends_to_all(width: int, num_positions: int, dtype: torch.dtype) -> None:
    """257 positions are those of the published models; 88 is the width of their heads."""
    qkv = (2 * torch.randn(2, num_positions, 3 * 3 * width, device=DEVICE)).to(dtype)
    query, key, value = (x.unflatten(-1, (3, -1)).transpose(1, 2) for x in qkv.double().chunk(3, -1))
    expected = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    assert_near(encoder_attention(qkv, 3), expected)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("width", [16, 96, 1408, 2560])
def test_a_sum_and_its_norm(width: int, dtype: torch.dtype, has_bias: bool) -> None:
    rows, update = ((2 + torch.randn(7, width, device=DEVICE)).to(dtype) for _ in range(2))
    rows[0] *= 1e-3
    update[0] *= 1e-3  # so that the variance is about as small as the epsilon
    weight, bias = (torch.randn(width, device=DEVICE).to(dtype) for _ in range(2))
    total, normed = add_and_norm(rows, update, (weight, bias if has_bias else None, 1e-6))
    assert torch.equal(total, rows + update)
    double_bias = bias.double() if has_bias else None
    assert_near(normed, F.layer_norm(total.double(), (width,), weight.double(), double_bias, 1e-6))


ACTIVATIONS = {
    "": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def assert_scaled(levels: Tensor, largest: Tensor, expected: Tensor) -> None:
    """Compare rows in fp8 with the numbers that they represent."""
    assert levels.dtype is FP8
    count = len(expected)
    found = levels[:count].double() * largest[:count].double() / torch.finfo(FP8).max
    assert (found - expected).norm() <= FP8_ERROR * expected.norm()
    torch.testing.assert_close(largest[:count, 0].double(), expected.abs().amax(-1), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [16, 1408, 6144])
def test_rows_are_scaled_to_fp8(width: int, activation: str) -> None:
    rows = torch.randn(5, 2 * width, device=DEVICE).to(HALF[-1])[:, :width]
    levels, largest = scale_rows_to_fp8(rows, 1e-6, activation)
    assert_scaled(levels, largest, ACTIVATIONS[activation](rows.double()))


@pytest.mark.parametrize("has_update", [False, True])
def test_a_norm_is_scaled_to_fp8(has_update: bool) -> None:
    rows, update = ((2 + torch.randn(130, 1408, device=DEVICE)).to(HALF[-1]) for _ in range(2))
    weight, bias = (torch.randn(1408, device=DEVICE).to(HALF[-1]) for _ in range(2))
    given = update if has_update else None
    total, levels, largest = add_norm_and_scale(rows, given, (weight, bias, 1e-6), 1e-6)
    assert torch.equal(total, rows + update if has_update else rows)
    expected = F.layer_norm(total.double(), (1408,), weight.double(), bias.double(), 1e-6)
    assert_scaled(levels, largest, expected)


def test_a_row_of_zeros_stays_one() -> None:
    levels, largest = scale_rows_to_fp8(torch.zeros(2, 48, device=DEVICE), 1e-6)
    assert not levels[:2].float().any() and largest[:2].eq(1e-6).all()


def formula(query: Tensor, kv: Tensor, counts: Tensor, bias: Tensor | None, num_heads: int) -> Tensor:
    key, value = kv.double().unflatten(-1, (2 * num_heads, -1)).transpose(1, 2).chunk(2, dim=1)
    heads = query.double().unflatten(-1, (num_heads, 1, -1))
    scores = heads @ key.transpose(-1, -2) * heads.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias.double()
    outside = torch.arange(kv.shape[1], device=kv.device) >= counts[:, None]
    return (scores.masked_fill(outside[:, None, None], float("-inf")).softmax(-1) @ value).flatten(1)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("width", [16, 64, 80, 88])
def test_each_slot_attends_to_its_own_positions(width: int, dtype: torch.dtype, has_bias: bool) -> None:
    """80 is the head width of OPT, 64 that of T5; data beyond a slot's positions must not count."""
    num_slots, length, num_heads, num_rows = 9, 70, 3, 7
    kv = torch.randn(num_slots, length, 2 * num_heads * width, device=DEVICE).to(dtype)
    query = torch.randn(num_rows, 3 * num_heads * width, device=DEVICE).to(dtype)[:, : num_heads * width]
    counts = torch.tensor([1, 70, 15, 16, 17, 33, 64], device=DEVICE)
    for row, count in enumerate(counts.tolist()):
        kv[row, count:] = float("nan")
    bias = torch.randn(num_rows, num_heads, 1, length + 2, device=DEVICE)[..., :length] if has_bias else None
    found = decode_attention(query, kv, counts, bias, num_heads, None)
    assert_near(found, formula(query, kv[:num_rows].nan_to_num(), counts, bias, num_heads))
