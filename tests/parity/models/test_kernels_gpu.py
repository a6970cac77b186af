"""The kernels of this package are compiled for a GPU, and a layer in fp8 uses them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from blip2_actor.models import residual, vision
from blip2_actor.models.kv_cache import KVCache
from blip2_actor.models.layers import Linear
from blip2_actor.quantization.row_scaled import FP8, RowScaledWeight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernels_can_be_compiled(dtype: torch.dtype) -> None:
    """Use the shapes of the published models; `tests/kernels` compares the results."""
    device = torch.device("cuda", 0)
    assert vision._find_kernel(device, dtype, 257, 3 * 1408, 16) is not None
    assert residual._find_kernel(device, dtype) is not None
    assert KVCache(2, 9, 70, 2560, device, dtype).reads_counts


def norm_of(width: int, dtype: torch.dtype, has_bias: bool) -> nn.LayerNorm:
    norm = nn.LayerNorm(width, eps=1e-6, bias=has_bias, device="cuda", dtype=dtype)
    for parameter in norm.parameters():
        parameter.normal_()
    return norm


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_update", [False, True])
def test_a_layer_in_fp8_reads_a_norm(has_update: bool, has_bias: bool) -> None:
    """Computed in float32, so it differs from torch's bfloat16 by about one rounding."""
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
