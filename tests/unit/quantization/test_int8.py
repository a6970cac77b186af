"""Products of bytes are exact on every CPU, and rows do not affect each other."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from blip2_actor.device import onednn_limit
from blip2_actor.quantization.int8 import (
    BLOCK_ELEMENTS,
    FULL_WEIGHT,
    HALF_WEIGHT,
    MAGIC,
    Int8Weight,
    is_exact,
    largest_weight,
    quantize_rows,
    quantize_weight,
)

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="int8 needs oneDNN")
PROGRAM = """
from blip2_actor.quantization.int8 import instructions, is_exact, largest_weight
print(largest_weight(), is_exact(63), is_exact(127), instructions())
"""


def test_products_saturate_without_vnni_and_use_seven_bits() -> None:
    """Two bytes are added in 16 bits there: 2 * 255 * 127 is too large, and the sum would be cut."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == f"{HALF_WEIGHT} True False AVX2 (ONEDNN_MAX_CPU_ISA)\n", done.stderr


def test_products_of_full_range_equal_an_integer_product_on_this_cpu() -> None:
    assert is_exact(largest_weight())
    if not onednn_limit():
        has_vnni = torch.cpu._is_vnni_supported()
        assert largest_weight() == (FULL_WEIGHT if has_vnni else HALF_WEIGHT)


def test_rows_are_rounded_to_the_nearest_of_255_levels() -> None:
    rows = torch.tensor([[0.5, -1.0, 0.0, 0.251], [254.0, 3.0, -1.0, 127.0]])
    levels, largest = quantize_rows(rows, torch.full((4,), MAGIC))
    assert largest.tolist() == [[1.0], [254.0]]
    assert (levels.int() - 128).tolist() == [[64, -127, 0, 32], [127, 2, 0, 64]]  # halves go to even numbers


def test_each_output_channel_has_a_scale() -> None:
    weight = torch.tensor([[1.0, -0.5], [100.0, 1.0], [0.0, 0.0]])
    levels, scale = quantize_weight(weight, 127)
    assert levels.tolist() == [[127, -64], [127, 1], [0, 0]]
    torch.testing.assert_close(levels * scale[:, None], weight, rtol=0, atol=100 / 254)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_near_its_plain_self_for_any_shape(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for shape, num_channels in (((3, 5, 24), 49), ((1, 13), 7), ((70, 96), 160)):
        x = torch.randn(shape, generator=generator).to(dtype)
        weight = torch.randn((num_channels, shape[-1]), generator=generator)
        bias = torch.randn(num_channels, generator=generator).to(dtype)
        quantized = Int8Weight(weight, largest_weight())
        expected = torch.nn.functional.linear(x.float(), weight)
        for b in (bias, None):
            found = quantized(x, b)
            exact = expected if b is None else expected + b.float()
            assert found.dtype is dtype
            assert (found.float() - exact).norm() / exact.norm() < 0.03


def test_a_row_has_the_same_bits_alone_and_between_others() -> None:
    """With one scale for a whole batch, an image would change the captions of its neighbors."""
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(2))
    x[::2] *= 1000
    quantized = Int8Weight(torch.randn(48, 96), largest_weight())
    together = quantized(x, None)
    assert all(torch.equal(together[i : i + 1], quantized(x[i : i + 1], None)) for i in (0, 1, 30, 63))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_go_block_by_block_and_the_activation_is_applied_before_rounding(
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(3)
    num_rows = 2 * (BLOCK_ELEMENTS // 96) + 1
    x = torch.randn(num_rows, 96, generator=generator).to(dtype)
    bias = torch.randn(48, generator=generator).to(dtype)
    quantized = Int8Weight(torch.randn(48, 96, generator=generator), largest_weight())
    together = quantized(x, bias, torch.nn.functional.gelu)
    assert all(
        torch.equal(together[i], quantized(x[i : i + 1], bias, torch.nn.functional.gelu)[0])
        for i in (0, num_rows // 2 - 1, num_rows // 2, num_rows - 1)
    )
    plain = quantized(x[:2].float(), bias.float())
    assert torch.equal(together[:2], torch.nn.functional.gelu(plain).to(dtype))


def test_zeros_stay_zero_and_bad_numbers_stay_in_their_row() -> None:
    x = torch.ones(4, 32)
    x[0], x[1, 3], x[2, 5] = 0.0, torch.nan, torch.inf
    bias = torch.full((16,), 0.5)
    found = Int8Weight(torch.ones(16, 32), largest_weight())(x, bias)
    assert torch.equal(found[0], bias)
    assert not found[1:3].isfinite().any()
    torch.testing.assert_close(found[3], torch.full((16,), 32.5), rtol=0.01, atol=0)
