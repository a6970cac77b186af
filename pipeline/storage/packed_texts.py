"""`PackedTexts`: many similar texts, such as the names of files, in a few bytes each."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import overload

SEPARATOR = "\0"
"""No file name holds it."""


class PackedTexts(Sequence[str]):
    """Texts without a NUL in an order of their own; immutable. Those used last are kept unpacked."""

    __slots__ = ("_length", "_packed")

    def __init__(self, texts: Iterable[str]) -> None:
        texts = tuple(texts)
        self._length = len(texts)
        self._packed = zlib.compress(SEPARATOR.join(texts).encode(errors="surrogatepass"), level=1)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        return self._unpacked()[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackedTexts) and self._packed == other._packed

    def __hash__(self) -> int:
        return hash(self._packed)

    def __repr__(self) -> str:
        return f"PackedTexts({list(self)!r})"

    @property
    def num_bytes(self) -> int:
        return len(self._packed)

    def _unpacked(self) -> tuple[str, ...]:
        return _unpack(self._packed) if self._length else ()


@lru_cache(maxsize=16)
def _unpack(packed: bytes) -> tuple[str, ...]:
    return tuple(zlib.decompress(packed).decode(errors="surrogatepass").split(SEPARATOR))
