"""`PackedTexts`: many similar texts, such as the names of files, in a few bytes each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import overload

from pipeline.storage.spill import Spill

SEPARATOR = "\0"
"""No file name holds it."""

_spill = Spill()


class PackedTexts(Sequence[str]):
    """Texts without a NUL in an order of their own; immutable. Those used last are kept unpacked.

    The first ones of a process are in memory, all others in temporary files: 10^8 random names are 2 GB.
    """

    __slots__ = ("_hash", "_length", "_num_raw_bytes", "_packed")

    def __init__(self, texts: Iterable[str]) -> None:
        from pyarrow import Codec  # The command line has shards in its types, and must start without pyarrow.

        texts = tuple(texts)
        raw = SEPARATOR.join(texts).encode(errors="surrogatepass")
        packed = Codec("zstd", compression_level=1).compress(raw, asbytes=True)
        self.__setstate__((len(texts), len(raw), packed))

    def __getstate__(self) -> tuple[int, int, bytes]:
        return self._length, self._num_raw_bytes, bytes(self._packed)

    def __setstate__(self, state: tuple[int, int, bytes]) -> None:
        self._length, self._num_raw_bytes, packed = state
        self._hash = hash(packed)
        self._packed = _spill.keep(packed)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        return (_unpack(self) if self._length else ())[index]

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, PackedTexts)
            and self._hash == other._hash
            and bytes(self._packed) == bytes(other._packed)
        )

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"PackedTexts({list(self)!r})"


@lru_cache(maxsize=16)
def _unpack(texts: PackedTexts) -> tuple[str, ...]:
    from pyarrow import Codec

    raw = Codec("zstd").decompress(bytes(texts._packed), texts._num_raw_bytes, asbytes=True)
    return tuple(raw.decode(errors="surrogatepass").split(SEPARATOR))
