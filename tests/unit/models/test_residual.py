"""When kernels add to the residual stream and normalize it. A CPU replaces the GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip2_actor.models import residual
from blip2_actor.models.layers import Activation, Linear, QuantizedWeight
from blip2_actor.models.residual import multiply_norm, normalize

WIDTH, NUM_CHANNELS = 6, 4


class Kernels:
    """Computes the kernel's result with torch's operations, and counts the calls."""

    def __init__(self) -> None:
        self.num_calls = 0

    def add_and_norm(
        self, rows: Tensor, update: Tensor, norm: tuple[Tensor, Tensor | None, float]
    ) -> tuple[Tensor, Tensor]:
        self.num_calls += 1
        assert rows.dim() == 2 and rows.is_contiguous() and update.is_contiguous()
        total = rows + update
        return total, F.layer_norm(total, total.shape[-1:], *norm)


class ReadsNorms(QuantizedWeight):
    """A quantized weight that adds and normalizes by itself; its product is the sum of each row."""

    def __call__(self, input: Tensor, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
        output = input.sum(-1, keepdim=True).expand(*input.shape[:-1], NUM_CHANNELS)
        return output if activation is None else activation(output)

    def multiply_norm(
        self, hidden: Tensor, update: Tensor | None, norm: nn.LayerNorm, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        total = hidden if update is None else hidden + update
        return total, self(norm(total), bias)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    kernels = Kernels()
    monkeypatch.setattr(residual, "runs_kernels", lambda hidden: not torch.is_grad_enabled())
    monkeypatch.setattr(residual, "_find_kernel", lambda device, dtype: kernels.add_and_norm)
    torch.manual_seed(0)
    with torch.no_grad():
        yield kernels


def norm_of(dtype: torch.dtype, **options: bool) -> nn.LayerNorm:
    norm = nn.LayerNorm(WIDTH, dtype=dtype, **options)
    for parameter in norm.parameters():
        parameter.data.normal_()
    return norm


def stream(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    hidden, update = torch.randn(2, 2, 3, 2 * WIDTH).to(dtype)[..., :WIDTH]  # not contiguous
    return hidden, update


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_kernel_gets_the_sum_and_the_norm_of_contiguous_rows(kernels: Kernels, has_bias: bool) -> None:
    norm = norm_of(torch.bfloat16, bias=has_bias)
    hidden, update = stream(torch.bfloat16)
    total, normed = normalize(norm, hidden, update)
    assert kernels.num_calls == 1
    assert torch.equal(total, hidden + update) and torch.equal(normed, norm(hidden + update))


def test_without_an_update_the_stream_stays_as_it_is(kernels: Kernels) -> None:
    norm, (hidden, _) = norm_of(torch.bfloat16), stream(torch.bfloat16)
    total, normed = normalize(norm, hidden, None)
    assert total is hidden and torch.equal(normed, norm(hidden)) and kernels.num_calls == 0


@pytest.mark.parametrize("why", ["float32", "no weight", "elsewhere", "gradients"])
def test_what_a_kernel_cannot_do_is_done_by_torch(
    kernels: Kernels, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel would take the rows for the weight of a norm that has none."""
    dtype = torch.float32 if why == "float32" else torch.bfloat16
    norm, (hidden, update) = norm_of(dtype, elementwise_affine=why != "no weight"), stream(dtype)
    if why == "elsewhere":  # as the hook of a split model moves it
        own = norm.weight.data
        norm.weight = nn.Parameter(own.to("meta"))
        monkeypatch.setattr(norm, "forward", lambda x: F.layer_norm(x, (WIDTH,), own, norm.bias, norm.eps))
    with torch.set_grad_enabled(why == "gradients"):
        total, normed = normalize(norm, hidden, update)
    assert kernels.num_calls == 0
    assert torch.equal(total, hidden + update) and torch.equal(normed, norm(hidden + update))


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("has_update", [False, True])
def test_a_layer_keeps_its_activation_if_its_weight_reads_norms(
    kernels: Kernels, has_update: bool, activation: str | None
) -> None:
    """The next layer computes the activation only if it is also quantized."""
    norm, linear = norm_of(torch.bfloat16), Linear(WIDTH, NUM_CHANNELS, activation=activation)
    linear.take(ReadsNorms())
    hidden, update = stream(torch.bfloat16)
    total, found = multiply_norm(norm, linear, hidden, update if has_update else None)
    expected = hidden + update if has_update else hidden
    assert torch.equal(total, expected) and torch.equal(found, linear(norm(expected)))
    assert kernels.num_calls == 0


def test_a_plain_layer_reads_the_norm_of_a_kernel(kernels: Kernels) -> None:
    norm, linear = norm_of(torch.bfloat16), Linear(WIDTH, NUM_CHANNELS, activation="relu").bfloat16()
    for parameter in linear.parameters():
        parameter.data.normal_()
    hidden, update = stream(torch.bfloat16)
    total, found = multiply_norm(norm, linear, hidden, update)
    assert kernels.num_calls == 1
    assert torch.equal(found, linear(norm(hidden + update))) and torch.equal(total, hidden + update)
