"""`PackedTexts`: many similar texts, such as the names of files, in a few bytes each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import overload

SEPARATOR = "\0"
"""No file name holds it."""


class PackedTexts(Sequence[str]):
    """Texts without a NUL in an order of their own; immutable. Those used last are kept unpacked."""

    __slots__ = ("_length", "_num_raw_bytes", "_packed")

    def __init__(self, texts: Iterable[str]) -> None:
        from pyarrow import Codec  # The command line has shards in its types, and must start without pyarrow.

        texts = tuple(texts)
        raw = SEPARATOR.join(texts).encode(errors="surrogatepass")
        self._length = len(texts)
        self._num_raw_bytes = len(raw)
        self._packed: bytes = Codec("zstd", compression_level=1).compress(raw, asbytes=True)

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
        return _unpack(self._packed, self._num_raw_bytes) if self._length else ()


@lru_cache(maxsize=16)
def _unpack(packed: bytes, num_raw_bytes: int) -> tuple[str, ...]:
    from pyarrow import Codec

    raw = Codec("zstd").decompress(packed, num_raw_bytes, asbytes=True)
    return tuple(raw.decode(errors="surrogatepass").split(SEPARATOR))
