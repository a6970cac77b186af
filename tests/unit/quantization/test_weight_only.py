"""A layer with only its weight in int8 computes what its dequantized weight computes, in every dtype."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from blip2_actor.quantization import weight_only
from blip2_actor.quantization.int8 import quantize_weight
from blip2_actor.quantization.weight_only import Int8StoredWeight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_it_multiplies_by_the_dequantized_weight(
    dtype: torch.dtype, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        weight_only, "BLOCK_ELEMENTS", 7 * 48
    )  # 30 channels are several blocks, the last small
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(30, 48, generator=generator)
    input = torch.randn(2, 5, 48, generator=generator).to(dtype)
    bias = torch.randn(30, generator=generator).to(dtype) if has_bias else None
    levels, scale = quantize_weight(weight, 127)
    expected = F.linear(input.float(), levels * scale[:, None], None if bias is None else bias.float())
    found = Int8StoredWeight(weight)(input, bias)
    assert found.dtype == dtype
    accuracy = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.01}[dtype]
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=accuracy)


def test_large_sums_do_not_overflow_in_float16() -> None:
    """Levels of up to 127 times the input are beyond its range, although the result is not."""
    input = torch.full((1, 1024), 8.0, dtype=torch.float16)
    found = Int8StoredWeight(torch.full((16, 1024), 0.01))(input, None)
    torch.testing.assert_close(found, torch.full((1, 16), 81.9, dtype=torch.float16), rtol=0.01, atol=0)
