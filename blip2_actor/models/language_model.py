"""What the scheduler asks of a language model: prefixes in, slots that advance token by token.

`OptDecoder` (decoder only) and `T5` (encoder and decoder) are the two that exist.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from blip2_actor.models.layers import Linear


class KVCacheProtocol(Protocol):
    """Whatever a language model remembers of each running text, one slot each."""

    num_slots: int

    @property
    def max_length(self) -> int:
        """Positions of one slot that `decode` appends to."""
        ...

    @property
    def num_bytes(self) -> int:
        """Of all slots together."""
        ...

    def step_shape(self, num_rows: int) -> Hashable:
        """What the shape of a decode step over the first slots follows from, besides rows and reach."""
        ...

    def holds(self, prefix_length: int, max_new_tokens: int) -> bool:
        """True where a slot is long enough for such a text."""
        ...

    def grow(self, prefix_length: int, max_new_tokens: int) -> None:
        """Make every slot at least that long; what is in them stays."""
        ...

    def copy_slots(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy whole texts of up to `length` cached positions into other slots."""
        ...

    def copy_positions(self, sources: list[int], targets: list[int], start: int, stop: int) -> None:
        """Copy only positions [start, stop) between slots whose earlier positions are equal."""
        ...


class LanguageModel(Protocol):
    """A decoder that works in slots; `cache` is what its own `new_kv_cache` made."""

    embed_tokens: nn.Embedding
    lm_head: Linear
    max_positions: int | None
    """Most positions of one text, prefix and new tokens together; None where there is no limit."""

    def tie_weights(self) -> None:
        """Share the head with the embeddings."""
        ...

    def cast(self, dtype: torch.dtype) -> Self:
        """To `dtype`, but for what must stay in another."""
        ...

    def __call__(self, prefix: Tensor, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Teacher forcing as the reference's `forward(labels=…)`.

        float[B, Q, Dw], int64[B, T], int64[B, U] -> float[B, U, V], logits that predict the labels.
        """
        ...

    def predict(self, prefixes: list[Tensor], texts: list[Tensor]) -> list[Tensor]:
        """Logits of given texts: float[T_i, Dw] and int64[U_i] each -> float[U_i, V] each."""
        ...

    def text_features(self, texts: list[Tensor]) -> list[Tensor]:
        """Last hidden states of texts alone: int64[T_i] each -> float[T_i, Dw] each."""
        ...

    def new_kv_cache(self, num_slots: int, prefix_length: int, max_new_tokens: int) -> KVCacheProtocol: ...

    def prefix_ids(self, input_ids: list[int]) -> list[int]:
        """The ids that the reference's `generate` starts from: the input's, or a decoder's start token."""
        ...

    def cached_length(self, prefix_length: int) -> int:
        """Positions of the decoder's own cache that `prefill` fills."""
        ...

    def prefill(self, prefixes: list[Tensor], slots: list[int], cache: Any) -> Tensor:
        """float[T_i, Dw] each -> float[n, V], logits of the first new tokens."""
        ...

    def decode(self, token_ids: Tensor, lengths: Tensor, cache: Any, kv_len: int) -> Tensor:
        """int64[R], int64[R] -> float[R, V]: append one token to slots 0..R-1.

        Its shapes follow from R, `kv_len` (positions to look at) and `KVCacheProtocol.step_shape`; its values
        from tensors alone: it never waits for the device, and can be recorded and replayed.
        """
        ...
