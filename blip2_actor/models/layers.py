"""Building blocks of every part of the model: linear layers, lists of layers, attention heads.

Axis letters: `blip2.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip2_actor.device import is_fast_in_bfloat16

logger = logging.getLogger(__name__)

Activation: TypeAlias = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
"""By their names in configurations."""


class QuantizedWeight(Protocol):
    """A weight that is stored in fewer bits and multiplies by itself (`blip2_actor/quantization/`)."""

    def __call__(self, input: Tensor, bias: Tensor | None, activation: Activation | None = None) -> Tensor:
        """Multiply, add the bias, and apply the activation.

        float[..., D] -> float[..., N], in the dtype of `input`.
        """
        ...

    def multiply_norm(
        self, hidden: Tensor, update: Tensor | None, norm: nn.LayerNorm, bias: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Add and normalize in the pass that quantizes the rows, and multiply; None if this weight does not.

        Arguments and result are those of `residual.multiply_norm`, which applies the activation.
        """
        return None


class Linear(nn.Linear):
    """`nn.Linear` with its activation function attached, and uninitialized: weights are always loaded.

    For inference on a CPU, `pack` turns it into one oneDNN operation. `take` replaces its weight by a
    quantized one.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, activation: str | None = None
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.activation = ACTIVATIONS[activation] if activation else None
        self._activation_name = activation
        self._packed: Tensor | None = None
        self._has_both = False
        """True if the plain weight is kept next to the packed one, for inputs of few rows."""
        self.quantized: QuantizedWeight | None = None

    def reset_parameters(self) -> None:
        """Do nothing: loading overwrites every weight."""

    def forward(self, input: Tensor) -> Tensor:
        if self._packed is not None and not (self._has_both and input.numel() <= FEW_ROWS * self.in_features):
            post, algorithm = _ONEDNN_POST_OPS[self._activation_name]
            return torch.ops.mkldnn._linear_pointwise(input, self._packed, self.bias, post, [], algorithm)
        if self.quantized is not None:
            return self.quantized(input, self.bias, self.activation)
        if self._activation_name == "relu" and self._can_fuse_relu(input):
            # One kernel instead of two, and exact: the maximum with 0 commutes with rounding.
            rows = torch._addmm_activation(self.bias, input.flatten(0, -2), self.weight.t(), use_gelu=False)
            return rows.unflatten(0, input.shape[:-1])
        output = F.linear(input, self.weight, self.bias)
        return output if self.activation is None else self.activation(output)

    def _can_fuse_relu(self, input: Tensor) -> bool:
        """True on a GPU, with a bias, and without gradients, which the fused operation does not have."""
        return input.is_cuda and self.bias is not None and not torch.is_grad_enabled()

    def pack(self) -> None:
        """Convert the weight to oneDNN's layout once, instead of in every call, and fuse the activation.

        The plain weight is freed (a shared one stays with its other owner), so there are no gradients and
        no state dict after this call. A small float32 layer keeps it for inputs of few rows, for which
        oneDNN's own cost per call is more than it saves: one row of a 128x384 layer takes 18 us packed and
        6 us plain. On two AVX512-BF16 cores (2026-11-23) a 768x3072 layer with its gelu
        takes 0.71 of the time in float32 and 0.90 in bfloat16 for 2,056 rows, 0.74 and 0.86 for 64 rows.
        """
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), PACKED_FOR_ROWS)
        self._has_both = self.weight.dtype is torch.float32 and self.weight.numel() <= SMALL_WEIGHT
        if not self._has_both:
            self._free_weight()

    def take_activation(self) -> str | None:
        """Leave the activation to the layer after this one, and return its name; None if there is none."""
        name, self._activation_name, self.activation = self._activation_name, None, None
        return name

    def take(self, quantized: QuantizedWeight) -> None:
        """Multiply by a quantized weight from now on; the plain weight is freed, as by `pack`."""
        self.quantized = quantized
        self._free_weight()

    def _free_weight(self) -> None:
        self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)


_ONEDNN_POST_OPS = {
    None: ("none", "none"),
    "gelu": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "relu": ("relu", "none"),
}
"""Our activations in the words of `mkldnn::_linear_pointwise`: name and algorithm."""

PACKED_FOR_ROWS = 64
"""oneDNN chooses a layout for this number of rows; of 1, 8, 64, 256 and 2,056, this was never slower."""

SMALL_WEIGHT = 1 << 16
"""Elements of a weight that is small enough for `FEW_ROWS` to matter: 128 x 512. A 256 x 1024 layer with its
gelu takes as long packed as plain for one row, and less for more."""

FEW_ROWS = 32
"""Rows up to which a small layer is not slower plain than packed."""


def packed_dtypes() -> set[torch.dtype]:
    """Return the dtypes in which oneDNN computes on this CPU; none if this build of torch lacks oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return set()
    has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # with AVX512 or AVX-NE-CONVERT
    return {torch.float32, torch.bfloat16} if has_bfloat16 else {torch.float32}


def pack_for_cpu(model: nn.Module) -> None:
    """Pack every `Linear` of a model whose dtype oneDNN computes in on this CPU; the others stay plain.

    A quantized layer stays as it is.
    """
    dtypes = packed_dtypes()
    linears = [m for m in model.modules() if isinstance(m, Linear) and m.quantized is None]
    has_bfloat16 = torch.bfloat16 in {module.weight.dtype for module in linears}
    if has_bfloat16 and dtypes and not is_fast_in_bfloat16(torch.device("cpu")):
        logger.warning("This CPU is slow in bfloat16; float32 is faster")
    for module in linears:
        if module.weight.dtype in dtypes:
            module.pack()


class Embedding(nn.Embedding):
    """`nn.Embedding`, uninitialized: weights are always loaded.

    On the meta device, torch would import its compiler to initialize it. That takes two seconds, and leaves
    garbage that holds the model until the garbage collector runs.
    """

    def reset_parameters(self) -> None:
        """Do nothing: loading overwrites every weight."""


LayerT = TypeVar("LayerT", bound=nn.Module)


class Layers(nn.ModuleList, Generic[LayerT]):
    """An `nn.ModuleList` whose items have a known type."""

    def __iter__(self) -> Iterator[LayerT]:
        return cast("Iterator[LayerT]", super().__iter__())


HALF_DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes for which kernels of this package replace torch's; float32 keeps the reference's operations."""


def runs_kernels(input: Tensor) -> bool:
    """Return whether kernels of this package may run: on a GPU, without gradients, not being compiled."""
    return input.is_cuda and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def split_heads(states: Tensor, num_heads: int) -> Tensor:
    """[B, T, H * E] -> [B, H, T, E]."""
    return states.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


def merge_heads(states: Tensor) -> Tensor:
    """[B, H, T, E] -> [B, T, H * E]."""
    return states.transpose(-3, -2).flatten(-2)


MAX_SCORES = 1 << 26
"""Scores of one attention that a CPU keeps in memory in bfloat16: 128 MB, and as much again for the mask and
for the softmax. Without a limit, 32 prompts of 2,000 tokens took 5 GB with 16 heads."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Compute scaled dot-product attention in the way that is fastest on the device.

    That is torch's fused kernel, except for bfloat16 on a CPU. There, two matrix products and a softmax, as
    in transformers' "eager" attention, take 0.66 of its time at 257 tokens of 12 heads and 0.4 at 33 tokens
    (one AMD AVX512-BF16 core, 2026-11-23). They keep all scores in memory, so beyond `MAX_SCORES` it is the
    fused kernel again.

    Args:
        query: float[B, H, T, E].
        key: float[B, H, N, E].
        value: float[B, H, N, E].
        mask: bool (True is attended to) or float (added to the scores), broadcast to [B, H, T, N].
        is_causal: each position attends to itself and to those before it; T equals N.
        scale: factor of the scores; None is E ** -0.5.

    Returns:
        float[B, H, T, E].
    """
    num_scores = query.shape[:-1].numel() * key.shape[-2]
    is_fused = query.device.type != "cpu" or query.dtype is not torch.bfloat16 or num_scores > MAX_SCORES
    if is_fused or torch.is_grad_enabled():
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale
        )
    return attention_weights(query, key, mask, is_causal, scale) @ value


def attention_weights(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """Return what each position attends to: float[B, H, T, N]; the arguments are those of `attend`."""
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-1, -2)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril_()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    return scores.softmax(dim=-1)
