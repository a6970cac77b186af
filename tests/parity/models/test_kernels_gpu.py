"""The kernels for a GPU, against their formulas in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip2_actor.models import residual, vision
from blip2_actor.models.layers import Linear
from blip2_actor.quantization.row_scaled import FP8, RowScaledWeight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def assert_near(found: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCES[found.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("num_positions", [257, 256, 145, 577, 197, 17])
@pytest.mark.parametrize("width", [88, 64, 24])
def test_every_position_attends_to_all(width: int, num_positions: int, dtype: torch.dtype) -> None:
    """257 positions are those of the published models; 88 is the width of their heads."""
    kernel = vision._find_kernel(torch.device("cuda", 0), dtype, num_positions, 3 * 5 * width, 5)
    assert kernel is not None, "it cannot be compiled here"
    qkv = (2 * torch.randn(3, num_positions, 3 * 5 * width, device="cuda")).to(dtype)
    query, key, value = (x.unflatten(-1, (5, -1)).transpose(1, 2) for x in qkv.double().chunk(3, -1))
    expected = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    assert_near(kernel(qkv, 5), expected)
    assert_near(vision._attend_to_all(qkv, 5), expected)


def norm_of(width: int, dtype: torch.dtype, has_bias: bool) -> nn.LayerNorm:
    norm = nn.LayerNorm(width, eps=1e-6, bias=has_bias, device="cuda", dtype=dtype)
    for parameter in norm.parameters():
        parameter.normal_()
    return norm


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("width", [16, 96, 1408, 2560])
def test_a_sum_and_its_norm(width: int, dtype: torch.dtype, has_bias: bool) -> None:
    assert residual._find_kernel(torch.device("cuda", 0), dtype) is not None, "it cannot be compiled here"
    norm = norm_of(width, dtype, has_bias)
    hidden, update = (torch.randn(3, 7, width, device="cuda").to(dtype) for _ in range(2))
    total, normed = residual.normalize(norm, hidden, update)
    assert torch.equal(total, hidden + update)
    assert_near(normed, norm.double()(total.double()))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_update", [False, True])
def test_a_layer_in_fp8_reads_a_norm(has_update: bool, has_bias: bool) -> None:
    """In float32, so that it differs from torch's bfloat16 by one rounding more or less."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not compute in fp8")
    norm, linear = norm_of(1408, torch.bfloat16, has_bias), Linear(1408, 256).cuda().bfloat16()
    weight = torch.randn(256, 1408)
    linear.bias.normal_()
    linear.take(RowScaledWeight(weight.cuda(), FP8))
    hidden, update = (2 * torch.randn(5, 14, 1408, device="cuda").bfloat16() for _ in range(2))
    total, found = residual.multiply_norm(norm, linear, hidden, update if has_update else None)
    assert torch.equal(total, hidden + update if has_update else hidden)
    expected = RowScaledWeight(weight, FP8)(norm.float()(total.float()).cpu(), linear.bias.float().cpu())
    assert found.dtype is torch.bfloat16 and found.shape == (5, 14, 256)
    assert (found.float().cpu() - expected).norm() < 0.02 * expected.norm()
