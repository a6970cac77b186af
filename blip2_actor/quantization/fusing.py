"""Moving activations into the quantized layers that read them.

A layer in fp8 passes once over its input to scale the rows. If it computes the activation before it in the
same pass, the result need not be written and read again.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from blip2_actor.models.layers import Linear
from blip2_actor.models.opt import OptLayer
from blip2_actor.models.qformer import PostNormMlp
from blip2_actor.models.vision import VisionBlock
from blip2_actor.quantization.row_scaled import RowScaledWeight


def fuse_activations(model: nn.Module) -> None:
    """Move each activation whose only reader scales its rows into that reader."""
    for first, second in _pairs(model):
        weight = second.quantized
        if isinstance(weight, RowScaledWeight):
            weight.input_activation = first.take_activation()


def _pairs(model: nn.Module) -> Iterator[tuple[Linear, Linear]]:
    """Return the layers whose activation is read by one linear layer alone, each with that layer."""
    for module in model.modules():
        if isinstance(module, VisionBlock | OptLayer | PostNormMlp):
            yield module.fc1, module.fc2
