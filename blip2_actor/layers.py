"""The pieces that every part of the model is made of: linear layers, lists of layers, heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, cast

from torch import Tensor, nn
from torch.nn import functional as F

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def find_activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function that a configuration calls `name`.

    Raises:
        ValueError: this package has no such activation.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"hidden_act must be one of {', '.join(sorted(_ACTIVATIONS))}, got {name!r}")
    return _ACTIVATIONS[name]


class Linear(nn.Linear):
    """`nn.Linear`, uninitialised (weights are always loaded), with its activation attached."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, activation: str | None = None
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.activation = find_activation(activation) if activation else None

    def reset_parameters(self) -> None:
        """Nothing: a random start would only be overwritten."""

    def forward(self, input: Tensor) -> Tensor:
        output = F.linear(input, self.weight, self.bias)
        return output if self.activation is None else self.activation(output)


LayerT = TypeVar("LayerT", bound=nn.Module)


class Layers(nn.ModuleList, Generic[LayerT]):
    """A `nn.ModuleList` that knows what it holds."""

    def __iter__(self) -> Iterator[LayerT]:
        return cast("Iterator[LayerT]", super().__iter__())


def split_heads(states: Tensor, num_heads: int) -> Tensor:
    """[B, T, H * E] -> [B, H, T, E]."""
    return states.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


def merge_heads(states: Tensor) -> Tensor:
    """[B, H, T, E] -> [B, T, H * E]."""
    return states.transpose(-3, -2).flatten(-2)
