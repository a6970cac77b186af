"""The parts of T5: its norm, its relative position bias, its layer.

In a float16 model `wo` and the residual stream are float32 (see `t5.py`); the modules here adapt to the
dtypes of their weights and inputs.

Axis letters: `blip2.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config

from blip2_actor.models.layers import ACTIVATIONS, Embedding, Linear


class T5Norm(nn.Module):
    """Root mean square norm, computed in float32; the result has the dtype of the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        weight = self.weight.to(hidden.dtype)
        return F.rms_norm(hidden, weight.shape, weight, self.eps).to(self.weight.dtype)


class RelativeBias(Embedding):
    """The bias that is added to an attention score, by the distance of the two positions.

    All layers share one table.
    """

    def __init__(self, config: T5Config, is_bidirectional: bool) -> None:
        super().__init__(config.relative_attention_num_buckets, config.num_heads)
        self.is_bidirectional = is_bidirectional
        self.max_distance = config.relative_attention_max_distance

    def forward(self, relative: Tensor) -> Tensor:
        """Look up the bias of key position minus query position: int64[N, L] -> float[H, N, L]."""
        return super().forward(self._buckets(relative)).permute(2, 0, 1)

    def _buckets(self, relative: Tensor) -> Tensor:
        """Return the row of the table for each distance (the reference's `_relative_position_bucket`).

        Half of the rows are for one distance each, the other half for ranges that grow logarithmically. The
        float32 arithmetic follows the reference step by step: another order moves the borders of the ranges.
        """
        if self.is_bidirectional:
            num_rows = self.num_embeddings // 2
            offset, distance = (relative > 0).long() * num_rows, relative.abs()
        else:
            num_rows = self.num_embeddings
            offset, distance = torch.zeros_like(relative), (-relative).clamp(min=0)
        num_exact = num_rows // 2
        ratio = torch.log(distance.float() / num_exact) / math.log(self.max_distance / num_exact)
        far = num_exact + (ratio * (num_rows - num_exact)).long()
        return offset + torch.where(distance < num_exact, distance, far.clamp(max=num_rows - 1))


class T5Layer(nn.Module):
    """Self-attention, cross-attention if `reads_prefix` (the decoder), feed-forward; norms come first."""

    def __init__(self, config: T5Config, reads_prefix: bool) -> None:
        super().__init__()
        width, inner, eps = config.d_model, config.num_heads * config.d_kv, config.layer_norm_epsilon
        self.attention_norm = T5Norm(width, eps)
        self.qkv = Linear(width, 3 * inner, bias=False)
        self.out_proj = Linear(inner, width, bias=False)
        if reads_prefix:
            self.cross_norm = T5Norm(width, eps)
            self.cross_query = Linear(width, inner, bias=False)
            self.cross_kv = Linear(width, 2 * inner, bias=False)
            self.cross_out_proj = Linear(inner, width, bias=False)
        self.mlp_norm = T5Norm(width, eps)
        self.is_gated = config.is_gated_act
        self.activation = ACTIVATIONS[config.dense_act_fn]
        self.wi = Linear(width, config.d_ff * (2 if self.is_gated else 1), bias=False)
        self.wo = Linear(config.d_ff, width, bias=False)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries, and keys with values: float[..., Dw] -> float[..., D], float[..., 2 D]."""
        inner = self.out_proj.in_features
        query, kv = self.qkv(self.attention_norm(hidden)).split([inner, 2 * inner], dim=-1)
        return query, kv

    def project_cross(self, hidden: Tensor) -> Tensor:
        """Return the queries of the cross-attention: float[..., Dw] -> float[..., D]."""
        return self.cross_query(self.cross_norm(hidden))

    def add_attention(self, hidden: Tensor, context: Tensor) -> Tensor:
        return hidden + _clamp_float16(self.out_proj(context))

    def add_cross(self, hidden: Tensor, context: Tensor) -> Tensor:
        return hidden + _clamp_float16(self.cross_out_proj(context))

    def add_mlp(self, hidden: Tensor) -> Tensor:
        inner = self.wi(self.mlp_norm(hidden)).to(self.wo.weight.dtype)
        if self.is_gated:
            gate, linear = inner.chunk(2, -1)
            return hidden + self.wo(self.activation(gate) * linear)
        return hidden + self.wo(self.activation(inner))


def _clamp_float16(update: Tensor) -> Tensor:
    """Replace infinities in float16 by its largest number.

    This works element by element, so that one row does not change the other rows.
    """
    if update.dtype is not torch.float16:
        return update
    largest = torch.finfo(torch.float16).max
    return update.clamp(-largest, largest)
