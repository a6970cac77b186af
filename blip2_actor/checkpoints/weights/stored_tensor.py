"""What every source of a tensor has: a shape, and its elements in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

PIECE_BYTES = 4 << 20
"""Size of one piece."""


class StoredTensor(Protocol):
    """A tensor in a file, not read yet."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the elements in order, in pieces.

        Yields:
            The index of the piece's first element, and the piece as a flat tensor, which the next one
            overwrites.

        Raises:
            OSError: the file ends too early.
        """
        ...


def read_whole(stored: StoredTensor) -> Tensor:
    """Return all elements of a small tensor, as float32[*shape]."""
    whole = torch.empty(stored.shape, dtype=torch.float32)
    flat = whole.view(-1)
    for start, piece in stored.pieces():
        flat[start : start + len(piece)].copy_(piece)
    return whole
