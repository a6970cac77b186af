"""Token ids and attention masks as tokenizers give them: lists, arrays or tensors of one axis."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any


def to_token_ids(text: object) -> list[int]:
    """Return the token ids that a caller gives instead of a text.

    Raises:
        ValueError: they are no sequence of whole numbers from 0.
    """
    ids = _to_ints(text)
    if ids is None or min(ids, default=0) < 0:
        raise ValueError(f"text must be a str or token ids from 0, got {_described(text)}")
    return ids


def without_padding(token_ids: list[int], mask: Sequence[int] | None) -> list[int]:
    """Return the token ids that an attention mask lets through.

    Padding stands before or after a text. A text without it is read as the reference reads it with the mask.

    Raises:
        ValueError: the mask has another length, another value than 0 and 1, or zeros between ones.
    """
    if mask is None:
        return token_ids
    ones = _to_ints(mask)
    if ones is None or len(ones) != len(token_ids) or not set(ones) <= {0, 1}:
        raise ValueError(
            f"attention_masks must have a 0 or 1 for each of the {len(token_ids)} tokens, "
            f"got {_described(mask)}"
        )
    if 1 not in ones:
        raise ValueError("attention_masks must leave at least one token, got zeros alone")
    start, stop = ones.index(1), len(ones) - ones[::-1].index(1)
    if 0 in ones[start:stop]:
        raise ValueError(
            f"attention_masks must have their zeros before and after the text, got {_described(mask)}; "
            "leave out these tokens"
        )
    return token_ids[start:stop]


def _to_ints(given: Any) -> list[int] | None:
    """Return whole numbers, or None if it is anything else."""
    values = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(values, list | tuple) and all(isinstance(value, Integral) for value in values):
        return [int(value) for value in values]
    return None


def _described(given: object) -> str:
    shown = repr(given)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"
