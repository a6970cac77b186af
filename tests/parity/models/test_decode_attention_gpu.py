"""The attention of decode steps on a GPU, against its formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blip2_actor.models.kv_cache import KVCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
LENGTH, NUM_SLOTS = 70, 9


def formula(query: Tensor, kv: Tensor, counts: Tensor, bias: Tensor | None, num_heads: int) -> Tensor:
    key, value = kv.double().unflatten(-1, (2 * num_heads, -1)).transpose(1, 2).chunk(2, dim=1)
    heads = query.double().unflatten(-1, (num_heads, 1, -1))
    scores = heads @ key.transpose(-1, -2) * heads.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias.double()
    outside = torch.arange(kv.shape[1], device=kv.device) >= counts[:, None]
    return (scores.masked_fill(outside[:, None, None], float("-inf")).softmax(-1) @ value).flatten(1)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [16, 64, 80, 88])
def test_each_slot_attends_to_its_own_positions(width: int, dtype: torch.dtype, has_bias: bool) -> None:
    """80 is the width of OPT's heads, 64 that of T5's; what lies behind a slot's positions must not count."""
    torch.manual_seed(0)
    device, num_heads, num_rows = torch.device("cuda"), 3, 7
    cache = KVCache(2, NUM_SLOTS, LENGTH, num_heads * width, device, dtype)
    assert cache.reads_counts, "the kernel cannot be compiled here"
    cache.kv.normal_()
    query = torch.randn(num_rows, 3 * num_heads * width, device=device).to(dtype)[:, : num_heads * width]
    counts = torch.tensor([1, 70, 15, 16, 17, 33, 64], device=device)
    for row, count in enumerate(counts.tolist()):
        cache.kv[1, row, count:] = float("nan")
    bias = torch.randn(num_rows, num_heads, 1, LENGTH + 2, device=device)[..., :LENGTH] if has_bias else None
    found = cache.attend(1, query, cache.attended(counts, LENGTH, bias), num_heads)
    expected = formula(query, cache.kv[1, :num_rows].nan_to_num(), counts, bias, num_heads)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
