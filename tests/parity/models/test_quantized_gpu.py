"""Quantized engines on a GPU give nearly the plain engine's results, one by one and in batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from blip2_actor import EngineConfig, GenerationOptions, Request
from blip2_actor.models.layers import ACTIVATIONS
from blip2_actor.quantization.methods import MIN_CAPABILITY
from blip2_actor.quantization.row_scaled import FP8, RowScaledWeight
from blip2_actor.testing import save_random_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
IMAGES = list(np.random.default_rng(0).integers(0, 256, (4, 224, 224, 3), dtype=np.uint8))


def require(method: str) -> None:
    if torch.cuda.get_device_capability() < MIN_CAPABILITY.get(method, (0, 0)):
        pytest.skip(f"this GPU does not compute in {method}")


@pytest.mark.parametrize(("method", "dtype"), [("int8", torch.int8), ("fp8", FP8)])
@pytest.mark.parametrize("num_rows", [1, 17, 130])
def test_a_product_equals_that_of_the_cpu(method: str, dtype: torch.dtype, num_rows: int) -> None:
    require(method)
    weight, x = torch.randn(3072, 768), torch.randn(num_rows, 768)
    expected = RowScaledWeight(weight, dtype)(x, None)
    found = RowScaledWeight(weight.cuda(), dtype)(x.cuda(), None).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2 * float(expected.std()))
    assert (found - F.linear(x, weight)).norm() < 0.06 * F.linear(x, weight).norm()


@pytest.mark.parametrize("num_rows", [1, 3, 17, 130])
@pytest.mark.parametrize(("width", "num_channels"), [(768, 3072), (2560, 10240), (10240, 2560)])
def test_the_kernel_scales_rows_as_torch_does(width: int, num_channels: int, num_rows: int) -> None:
    """From bfloat16, one kernel scales the rows and the product applies the scales.

    This product sums faster and less exactly: of 10,240 numbers, a sum was off by 0.026 standard deviations.
    """
    require("fp8")
    weight, bias = torch.randn(num_channels, width), torch.randn(num_channels).bfloat16()
    x = torch.randn(num_rows, width).bfloat16()
    x[0] = 0
    quantized = RowScaledWeight(weight.cuda(), FP8)
    assert quantized._kernels is not None, "the kernel cannot be compiled here"
    found = quantized(x.cuda(), bias.cuda()).float().cpu()
    expected = RowScaledWeight(weight.cuda(), FP8)(x.cuda().float(), bias.cuda().float()).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=5e-2 * float(expected.std()))


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_the_kernel_computes_the_activation_before_the_layer(name: str) -> None:
    """Computed in float32, so it differs from torch's bfloat16 by about one rounding."""
    require("fp8")
    weight, x = torch.randn(256, 1408), 2 * torch.randn(70, 1408).bfloat16()
    quantized = RowScaledWeight(weight.cuda(), FP8)
    quantized.input_activation = name
    found = quantized(x.cuda(), None).float().cpu()
    expected = RowScaledWeight(weight, FP8)(ACTIVATIONS[name](x.float()), None)
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_a_row_that_is_not_finite_stays_so_and_alone() -> None:
    require("fp8")
    x = torch.randn(40, 96, device="cuda").bfloat16()
    quantized = RowScaledWeight(torch.randn(64, 96, device="cuda"), FP8)
    before = quantized(x, None)
    x[3, 5], x[7, 11] = float("nan"), float("inf")
    found = quantized(x, None)
    is_bad = torch.zeros(40, dtype=torch.bool)
    is_bad[[3, 7]] = True
    assert torch.equal(found[~is_bad], before[~is_bad])
    assert not found[is_bad].isfinite().any()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_checkpoint("midsize", tmp_path_factory.mktemp("models"), "cuda", torch.bfloat16)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("method", ["int8", "fp8", "int8-weights"])
def test_an_engine_is_near_the_plain_one_and_batches_do_not_matter(
    folder: Path, method: str, dtype: str, compiled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    require(method)
    config = EngineConfig(model=str(folder), device="cuda", dtype=dtype, max_slots=32, compile=compiled)  # type: ignore[arg-type]
    options = GenerationOptions(max_new_tokens=8)
    with replace(config, quantize=method).build() as quantized:  # type: ignore[arg-type]  # its self-test compares
        assert quantized.quantization is not None and any(quantized.quantization.num_layers.values())
        together = quantized.generate([Request(image=image) for image in IMAGES], options)
        assert all(result.ok for result in together)
        near = [score.logprob for score in quantized.score(IMAGES, ["a dog"] * 4)]
    with config.build() as plain:
        assert near == pytest.approx([s.logprob for s in plain.score(IMAGES, ["a dog"] * 4)], rel=0.1)
    assert "could not be compiled" not in caplog.text
