"""Moving outliers from activations into weights, before both are quantized (SmoothQuant, arXiv:2211.10438).

Some channels of a transformer's activations are a hundred times the others. Quantized together with them,
the other channels lose all their bits. If a layer norm precedes, its weight and bias can be divided by a
factor per channel, and the columns of the linear layer multiplied by it: the result is the same, and costs
nothing at run time. The factors are powers of two, so that no dtype rounds them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from blip2_actor.models.layers import Linear
from blip2_actor.models.opt import OptLayer
from blip2_actor.models.t5_layers import T5Layer, T5Norm
from blip2_actor.models.vision import VisionBlock

Norm = nn.LayerNorm | T5Norm


def preceding_norms(model: nn.Module) -> dict[Linear, Norm]:
    """Return the norm whose result is read by one linear layer alone, for each layer that has such a norm.

    In the Q-Former and in an OPT with norms after its layers, the result of a norm is also the residual.
    """
    return {linear: norm for linear, norm in _pairs(model) if getattr(norm, "weight", None) is not None}


def _pairs(model: nn.Module) -> Iterator[tuple[Linear, Norm]]:
    for module in model.modules():
        if isinstance(module, VisionBlock):
            yield module.qkv, module.layer_norm1
            yield module.fc1, module.layer_norm2
        elif isinstance(module, OptLayer) and module.norm_before:
            yield module.qkv, module.self_attn_layer_norm
            yield module.fc1, module.final_layer_norm
        elif isinstance(module, T5Layer):
            yield module.qkv, module.attention_norm
            yield module.wi, module.mlp_norm


def smoothing_factors(input: Tensor, weight: Tensor) -> Tensor:
    """Return what to divide each channel by, so that activations and weights are equally hard to quantize.

    Args:
        input: float32[M, D], rows that the layer reads.
        weight: float32[N, D].

    Returns:
        float32[D], powers of two.
    """
    of_input = input.abs().amax(dim=0).clamp_(min=1e-5)
    of_weight = weight.abs().amax(dim=0).clamp_(min=1e-5)
    return torch.exp2((of_input / of_weight).sqrt_().log2_().round_())


def divide(norm: Norm, factors: Tensor) -> None:
    """Divide the result of a norm, channel by channel."""
    norm.weight.div_(factors)
    if isinstance(norm, nn.LayerNorm) and norm.bias is not None:
        norm.bias.div_(factors)
