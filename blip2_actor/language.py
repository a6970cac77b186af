"""What the scheduler asks of a language model: prefixes in, slots that advance token by token.

`OptDecoder` (decoder only) and `T5` (encoder and decoder) are the two that exist.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


class Slots(Protocol):
    """Whatever a language model remembers of each running text, one slot each."""

    num_slots: int

    def holds(self, prefix_length: int, max_new_tokens: int) -> bool:
        """True where a slot is long enough for such a text."""
        ...

    def grow(self, prefix_length: int, max_new_tokens: int) -> None:
        """Make every slot at least that long; what is in them stays."""
        ...

    def fork(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy whole texts of up to `length` cached positions into other slots."""
        ...

    def reorder(self, sources: list[int], targets: list[int], start: int, stop: int) -> None:
        """Copy only positions [start, stop) between slots whose earlier positions are equal."""
        ...


class LanguageModel(Protocol):
    """A decoder that works in slots."""

    embed_tokens: nn.Embedding
    max_positions: int | None
    """Most positions of one text, prefix and new tokens together; None where there is no limit."""

    def new_slots(self, num_slots: int, prefix_length: int, max_new_tokens: int) -> Slots: ...

    def context_ids(self, input_ids: list[int]) -> list[int]:
        """The ids that the reference's `generate` starts from: the input's, or a decoder's start token."""
        ...

    def cached_length(self, prefix_length: int) -> int:
        """Positions of the decoder's own cache that `prefill` fills."""
        ...

    def prefill(self, prefixes: list[Tensor], slots: list[int], cache: Slots) -> Tensor:
        """float[T_i, Dw] each -> float[n, V], logits of the first new tokens."""
        ...

    def decode(self, token_ids: Tensor, lengths: Tensor, cache: Slots, max_length: int) -> Tensor:
        """int64[R], int64[R] -> float[R, V]: append one token to slots 0..R-1."""
        ...
