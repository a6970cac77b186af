"""The interface of a language model and of its KV cache, as the scheduler uses them.

A prefix (the projected image and the prompt) is written into a slot of the KV cache by `prefill`; `decode`
then advances all running slots by one token. `OptDecoder` (decoder only) and `T5` (encoder and decoder)
implement it.

Axis letters: `blip2.py`.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

from torch import Tensor

from blip2_actor.models.layers import Embedding, Linear
from blip2_actor.models.recorder import NO_RECORDER, Recorder


class KVCacheProtocol(Protocol):
    """Keys and values of the running texts, one slot per text."""

    num_slots: int

    @property
    def max_length(self) -> int:
        """Positions of one slot, of the cache that `decode` appends to."""
        ...

    @property
    def num_bytes(self) -> int:
        """Size of all slots together."""
        ...

    @property
    def reads_counts(self) -> bool:
        """True if attention reads the number of positions of each slot from the device. Then a step with a
        greater `kv_len` takes hardly longer, and the greatest serves all."""
        ...

    def step_shape(self, num_rows: int) -> Hashable:
        """Return what the shapes of a decode step depend on, apart from `num_rows` and `kv_len`."""
        ...

    def holds(self, prefix_length: int, max_new_tokens: int) -> bool:
        """Return True if a slot has room for such a text."""
        ...

    def grow(self, prefix_length: int, max_new_tokens: int) -> None:
        """Make every slot at least that long; their contents stay."""
        ...

    def copy_slots(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy whole texts, of at most `length` cached positions, into other slots."""
        ...

    def copy_positions(self, sources: list[int], targets: list[int], start: int, stop: int) -> None:
        """Copy positions [start, stop) between slots whose earlier positions are equal."""
        ...


class LanguageModel(Protocol):
    """A language model whose decoder works in slots."""

    embed_tokens: Embedding
    lm_head: Linear
    max_positions: int | None
    """Maximum number of positions of one text, prefix and new tokens together; None if there is no limit."""

    def tie_weights(self) -> None:
        """Share the weight of the head with the embeddings."""
        ...

    def __call__(self, prefix: Tensor, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Compute the logits that predict `labels`, as the reference's `forward(labels=…)` does.

        float[B, Q, Dw], int64[B, T], int64[B, U] -> float[B, U, V].
        """
        ...

    def predict(
        self, prefixes: list[Tensor], texts: list[Tensor], recorder: Recorder = NO_RECORDER
    ) -> list[Tensor]:
        """Compute the logits that predict given texts.

        float[T_i, Dw] each and int64[U_i] each -> float[U_i, V] each. A recorder takes the hidden states and
        the attentions of one text.
        """
        ...

    def text_features(self, texts: list[Tensor], recorder: Recorder = NO_RECORDER) -> list[Tensor]:
        """Return the last hidden states of texts without an image: int64[T_i] each -> float[T_i, Dw] each.

        A recorder takes the hidden states and the attentions of one text.
        """
        ...

    def new_kv_cache(self, num_slots: int, prefix_length: int, max_new_tokens: int) -> KVCacheProtocol: ...

    def prefix_ids(self, input_ids: list[int]) -> list[int]:
        """Return the ids that the reference's `generate` starts from.

        They are the input's ids for a decoder alone, and the start token for an encoder-decoder.
        """
        ...

    def cached_length(self, prefix_length: int) -> int:
        """Return the number of positions that `prefill` writes into a slot of the decoder's own cache."""
        ...

    def prefill(self, prefixes: list[Tensor], slots: list[int], cache: Any) -> Tensor:
        """Write prefixes into slots.

        Args:
            prefixes: float[T_i, Dw] each; lengths may differ.
            slots: one per prefix.
            cache: from `new_kv_cache`.

        Returns:
            float[N, V], the logits of the first new token of each text.
        """
        ...

    def decode(self, token_ids: Tensor, lengths: Tensor, cache: Any, kv_len: int) -> Tensor:
        """Append one token to each of the slots 0..R-1.

        R, `kv_len` and `KVCacheProtocol.step_shape` fix all shapes, and all values come from tensors. The
        function never waits for the device, so that a CUDA graph can capture it.

        Args:
            token_ids: int64[R], the token to append to each slot.
            lengths: int64[R], positions already in each slot, including T5's start token.
            cache: from `new_kv_cache`.
            kv_len: number of positions to attend to, greater than all of `lengths`.

        Returns:
            float[R, V], the logits of the next tokens.
        """
        ...
