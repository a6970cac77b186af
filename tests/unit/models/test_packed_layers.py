"""Layers are packed for oneDNN only in a dtype that it computes in on this CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from blip2_actor.models.layers import Linear, pack_for_cpu

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
    """Packing raises without AVX512, so an engine in bfloat16 did not start on a CPU with AVX2."""
    if is_supported and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no instructions for bfloat16")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: is_supported)
    model, x = layer(dtype), torch.randn(3, 8, dtype=dtype)
    expected = model(x)
    pack_for_cpu(nn.Sequential(model))
    is_slow = dtype is torch.bfloat16 and not is_supported
    assert (model.weight.numel() == 0) is not is_slow
    assert ("slow in it" in caplog.text) is is_slow
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
