"""When the kernel for the vision encoder's attention replaces torch's. A CPU replaces the GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from blip2_actor.models import vision
from blip2_actor.models.vision import _attend_to_all

NUM_HEADS, WIDTH = 2, 16


def attend(num_positions: int, dtype: torch.dtype) -> Tensor:
    qkv = torch.ones(3, num_positions, 3 * NUM_HEADS * WIDTH, dtype=dtype)
    with torch.no_grad():
        return _attend_to_all(qkv, NUM_HEADS)


@pytest.mark.parametrize(
    ("num_positions", "dtype", "is_replaced"),
    [
        (257, torch.bfloat16, True),
        (257, torch.float16, True),
        (144, torch.bfloat16, True),
        (257, torch.float32, False),
        (256, torch.bfloat16, False),
        (197, torch.bfloat16, False),
        (16, torch.bfloat16, False),
    ],
)
def test_it_replaces_torch_where_few_positions_are_left_over(
    num_positions: int, dtype: torch.dtype, is_replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float32 keeps the reference's operations."""
    asked: list[Any] = []

    def find(*shape: Any) -> Any:
        asked.append(shape)
        return lambda qkv, num_heads: qkv.chunk(3, -1)[0] + num_heads

    monkeypatch.setattr(vision, "runs_kernels", lambda qkv: True)
    monkeypatch.setattr(vision, "_find_kernel", find)
    found = attend(num_positions, dtype)
    assert found.shape == (3, num_positions, NUM_HEADS * WIDTH)
    expected = torch.full_like(found, 1 + NUM_HEADS if is_replaced else 1)
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0.01)  # torch rounds the weights
    shape = (torch.device("cpu"), dtype, num_positions, 3 * NUM_HEADS * WIDTH, NUM_HEADS)
    assert asked == [shape] * is_replaced


def test_torch_attends_where_the_kernel_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with little shared memory accepts small shapes, but not that of a real model."""

    def refuse(qkv: Tensor, num_heads: int) -> Tensor:
        if qkv.shape[1:] == (257, 3 * NUM_HEADS * WIDTH) and num_heads == NUM_HEADS:
            raise RuntimeError("out of shared memory")
        raise AssertionError("the kernel was tried with another shape")

    def find(device: torch.device, purpose: str, load: Callable[[], object]) -> None:
        with pytest.raises(RuntimeError, match="out of shared memory"):
            load()

    kernels = SimpleNamespace(encoder_attention=refuse)
    monkeypatch.setitem(sys.modules, "blip2_actor.models.encoder_attention", kernels)
    monkeypatch.setattr(vision, "runs_kernels", lambda qkv: True)
    monkeypatch.setattr(vision, "find_kernel", find)
    vision._find_kernel.cache_clear()
    found = attend(257, torch.bfloat16)
    vision._find_kernel.cache_clear()
    torch.testing.assert_close(found, torch.ones_like(found), atol=0.01, rtol=0.01)
