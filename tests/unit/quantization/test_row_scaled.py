"""A GPU's products in int8 and fp8, by torch's own kernels, which also exist for a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Blip2VisionConfig

from blip2_actor.models.layers import Linear
from blip2_actor.models.vision import VisionBlock
from blip2_actor.quantization.int8 import FULL_WEIGHT, is_exact
from blip2_actor.quantization.methods import require_method
from blip2_actor.quantization.quantize import fuse_activations
from blip2_actor.quantization.row_scaled import FP8, LARGEST, RowScaledWeight, scale_rows

DTYPES = (torch.int8, FP8)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "width", "num_channels"), [(1, 64, 48), (5, 50, 30), (70, 96, 16)])
def test_a_product_is_that_of_the_scaled_numbers_whatever_the_shape(
    dtype: torch.dtype, num_rows: int, width: int, num_channels: int
) -> None:
    """Sides that are not multiples of 16 are padded, and so are a few rows."""
    if dtype is torch.int8 and not is_exact(FULL_WEIGHT):
        pytest.skip("products of bytes saturate on this CPU; those of a GPU do not")
    x, weight, bias = normal(num_rows, width), normal(num_channels, width), normal(num_channels)
    (rows, of_rows), (channels, of_channels) = scale_rows(x, dtype), scale_rows(weight, dtype)
    exact = rows.double() @ channels.double().T
    expected = exact * of_rows.double() * of_channels.double().T / LARGEST[dtype] ** 2 + bias.double()
    found = RowScaledWeight(weight, dtype)(x, bias)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    plain = F.linear(x, weight, bias)
    assert 0 < (found - plain).norm() < (0.02 if dtype is torch.int8 else 0.06) * plain.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_each_other_and_a_bad_one_stays_bad(dtype: torch.dtype) -> None:
    x = normal(40, 64)
    quantized = RowScaledWeight(normal(48, 64), dtype)
    alone = torch.cat([quantized(row[None], None) for row in x])
    x[7, 3] = float("nan")
    together = quantized(x, None)
    good = torch.arange(40) != 7
    torch.testing.assert_close(together[good], alone[good], rtol=1e-5, atol=1e-5)
    assert not together[7].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_of_the_input_is_kept_and_a_zero_row_is_zero(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 3, 32, dtype=torch.bfloat16)
    found = RowScaledWeight(torch.zeros(16, 32), dtype)(x, None)
    assert found.dtype == torch.bfloat16 and found.shape == (2, 3, 16) and not found.any()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_compiles_as_one_graph(dtype: torch.dtype) -> None:
    """The encoders are compiled as a whole, and a break in the graph would be an error."""
    block = VisionBlock(Blip2VisionConfig(hidden_size=64, intermediate_size=96, num_attention_heads=2))
    for module in block.modules():
        if isinstance(module, Linear):
            nn.init.normal_(module.weight)
            nn.init.zeros_(module.bias)
            module.requires_grad_(False).take(RowScaledWeight(module.weight.data, dtype))
    fuse_activations(block)
    assert block.fc1.activation is None
    hidden, update = normal(2, 33, 64), normal(2, 33, 64)
    compiled = torch.compile(block, dynamic=False, fullgraph=True, backend="eager")
    for found, expected in zip(compiled(hidden, update), block(hidden, update), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("method", "capability", "message"),
    [
        ("fp8", (8, 0), r"got fp8; it needs compute capability 8\.9, and this GPU has 8\.0$"),
        (
            "int8",
            (7, 0),
            r"^quantize must be int8-weights or left out on A GPU, got int8; it needs .* 7\.5",
        ),
        ("fp8", (8, 9), None),
        ("int8", (7, 5), None),
        ("int8-weights", (6, 0), None),
    ],
)
def test_a_gpu_that_does_not_compute_in_a_method_is_named(
    method: str, capability: tuple[int, int], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    if message is None:
        require_method(method, torch.device("cuda", 0))
        return
    with pytest.raises(ValueError, match=message):
        require_method(method, torch.device("cuda", 0))


def test_fp8_is_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match=r"^quantize must be int8 or int8-weights on a CPU, got fp8"):
        require_method("fp8", torch.device("cpu"))
