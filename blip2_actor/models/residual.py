"""The residual stream: every layer reads its norm, and what the layer computes is added to it.

The sum is not computed where a layer ends, but where the next norm begins: on a GPU one kernel then adds and
normalizes, so that the stream is read once instead of twice. In between, the stream is two tensors, `hidden`
and `update`. In float32 and on a CPU, torch's operations do the same in the same order.

Axis letters: `blip2.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor, nn

from blip2_actor.device import find_kernel
from blip2_actor.models.layers import HALF_DTYPES, Linear, runs_kernels

Kernel: TypeAlias = Callable[[Tensor, Tensor, "tuple[Tensor, Tensor | None, float]"], tuple[Tensor, Tensor]]
"""`add_and_norm`."""


def normalize(norm: nn.LayerNorm, hidden: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
    """Add what the layer before has computed, unless there is none, and normalize the sum.

    float[..., D] each -> the sum and its norm, float[..., D] each.
    """
    if update is None:
        return hidden, norm(hidden)
    kernel = None
    if runs_kernels(hidden) and hidden.dtype in HALF_DTYPES and are_on(hidden.device, norm.weight):
        kernel = _find_kernel(hidden.device, hidden.dtype)
    if kernel is None:
        hidden = hidden + update
        return hidden, norm(hidden)
    rows = hidden.reshape(-1, hidden.shape[-1])
    total, normed = kernel(rows, update.reshape(rows.shape), (norm.weight, norm.bias, norm.eps))
    return total.view(hidden.shape), normed.view(hidden.shape)


def multiply_norm(
    norm: nn.LayerNorm, linear: Linear, hidden: Tensor, update: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `normalize`, and apply a linear layer to the norm.

    Returns:
        The sum, float[..., D], and the result of the linear layer, float[..., N].
    """
    quantized = linear.quantized
    if quantized is not None and runs_kernels(hidden) and are_on(hidden.device, norm.weight, linear.bias):
        found = quantized.multiply_norm(hidden, update, norm, linear.bias)
        if found is not None:
            return found
    hidden, normed = normalize(norm, hidden, update)
    return hidden, linear(normed)


def are_on(device: torch.device, *parameters: Tensor | None) -> bool:
    """Return whether all parameters that exist are on a device; those of a split model may be elsewhere."""
    return all(parameter is None or parameter.device == device for parameter in parameters)


@cache
def _find_kernel(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    def load() -> Kernel:
        from blip2_actor.models.row_kernel import add_and_norm

        rows = torch.ones(1, 16, device=device, dtype=dtype)
        add_and_norm(rows, rows, (rows[0], rows[0], 1e-5))
        return add_and_norm

    return find_kernel(device, "Adding and normalizing", load)
