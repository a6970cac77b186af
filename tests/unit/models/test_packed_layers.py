"""Layers are packed for oneDNN in a dtype that this CPU supports; small ones only for many rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from blip2_actor.models import layers
from blip2_actor.models.layers import FEW_ROWS, SMALL_WEIGHT, Linear, pack_for_cpu

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="oneDNN packs the layers")


def layer(dtype: torch.dtype) -> Linear:
    linear = Linear(8, 16, activation="gelu").to(dtype)
    nn.init.normal_(linear.weight)
    nn.init.normal_(linear.bias)
    return linear


@torch.inference_mode()
@pytest.mark.parametrize("is_supported", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_is_packed_only_if_the_cpu_has_its_instructions(
    dtype: torch.dtype, is_supported: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Packing raises without AVX512, so a bfloat16 engine used not to start on a CPU with AVX2."""
    if is_supported and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no instructions for bfloat16")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: is_supported)
    monkeypatch.setattr(layers, "is_fast_in_bfloat16", lambda device: is_supported)
    model, x = layer(dtype), torch.randn(3, 8, dtype=dtype)
    expected = model(x)
    pack_for_cpu(nn.Sequential(model))
    is_slow = dtype is torch.bfloat16 and not is_supported
    assert (model._packed is None) is is_slow
    assert ("slow in bfloat16" in caplog.text) is is_slow
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)


@torch.inference_mode()
@pytest.mark.parametrize("out_features", [SMALL_WEIGHT // 8, SMALL_WEIGHT // 8 + 1], ids=["small", "large"])
def test_a_small_layer_is_plain_for_few_rows(out_features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """When packed, one row of a layer of the demonstration model took three times as long."""
    linear = Linear(8, out_features, activation="relu")
    nn.init.normal_(linear.weight)
    nn.init.normal_(linear.bias)
    few, many = torch.randn(2, FEW_ROWS // 2, 8), torch.randn(FEW_ROWS + 1, 8)
    expected = linear(few), linear(many)
    linear.pack()
    is_small = linear.weight.numel() > 0
    assert is_small is (out_features * 8 <= SMALL_WEIGHT)
    torch.testing.assert_close((linear(few), linear(many)), expected)
    plain: list[int] = []
    product = nn.functional.linear

    def counted(input: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        plain.append(input.numel() // 8)
        return product(input, *others)

    monkeypatch.setattr(nn.functional, "linear", counted)
    linear(few)
    linear(many)
    assert plain == ([FEW_ROWS] if is_small else [])
