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
    if hidden.dtype in HALF_DTYPES and _kernel_may_read(hidden, norm):
        kernel = _find_kernel(hidden.device, hidden.dtype)
    if kernel is None:
        hidden = hidden + update
        return hidden, norm(hidden)
    rows = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    total, normed = kernel(rows, update.reshape(rows.shape).contiguous(), (norm.weight, norm.bias, norm.eps))
    return total.view(hidden.shape), normed.view(hidden.shape)


def multiply_norm(
    norm: nn.LayerNorm, linear: Linear, hidden: Tensor, update: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `normalize`, and apply a linear layer to the norm.

    Returns:
        The sum, float[..., D], and the result of the linear layer, float[..., N].
    """
    if linear.quantized is not None and _kernel_may_read(hidden, norm, linear.bias):
        found = linear.quantized.multiply_norm(hidden, update, norm, linear.bias)
        if found is not None:
            total, output = found
            return total, output if linear.activation is None else linear.activation(output)
    hidden, normed = normalize(norm, hidden, update)
    return hidden, linear(normed)


def _kernel_may_read(hidden: Tensor, norm: nn.LayerNorm, bias: Tensor | None = None) -> bool:
    """Return whether a kernel may run, and finds the parameters; those of a split model may be elsewhere."""
    if not runs_kernels(hidden) or norm.weight is None:
        return False
    parameters = (norm.weight, norm.bias, bias)
    return all(parameter is None or parameter.device == hidden.device for parameter in parameters)


@cache
def _find_kernel(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    def load() -> Kernel:
        from blip2_actor.models.row_kernel import add_and_norm

        rows = torch.ones(1, 16, device=device, dtype=dtype)
        add_and_norm(rows, rows, (rows[0], rows[0], 1e-5))
        return add_and_norm

    return find_kernel(device, "Adding and normalizing", load)
