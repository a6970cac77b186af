"""Moving norms and activations into the quantized layers that read them.

A layer in fp8 passes once over its input to scale the rows. If it computes the norm or the activation before
it in the same pass, their results need not be written and read again.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from blip2_actor.models.layers import Linear
from blip2_actor.models.opt import OptLayer
from blip2_actor.models.qformer import PostNormMlp
from blip2_actor.models.vision import VisionBlock
from blip2_actor.quantization.row_scaled import LAYER_NORM, InputStep, RowScaledWeight
from blip2_actor.quantization.smoothing import Norm, preceding_norms


def fuse_input_steps(model: nn.Module) -> None:
    """Move each layer norm and activation whose only reader scales its rows into that reader."""
    norms = preceding_norms(model)
    for linear, norm in norms.items():
        weight = linear.quantized
        if isinstance(weight, RowScaledWeight) and isinstance(norm, nn.LayerNorm):
            weight.input_step = InputStep(LAYER_NORM, norm.weight, norm.bias, norm.eps)
            _replace(model, norm)
    for first, second in _pairs(model):
        weight = second.quantized
        if isinstance(weight, RowScaledWeight) and (name := first.take_activation()) is not None:
            weight.input_step = InputStep(name)


def _pairs(model: nn.Module) -> Iterator[tuple[Linear, Linear]]:
    """Return the layers whose activation is read by one linear layer alone, each with that layer."""
    for module in model.modules():
        if isinstance(module, VisionBlock | OptLayer | PostNormMlp):
            yield module.fc1, module.fc2


def _replace(model: nn.Module, norm: Norm) -> None:
    """Let a norm do nothing."""
    for module in model.modules():
        for name, child in module.named_children():
            if child is norm:
                setattr(module, name, nn.Identity())
