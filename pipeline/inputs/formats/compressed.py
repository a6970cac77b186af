"""Decompress zstd and xz with what may stand between and after their streams: padding, and skippable frames.

Arrow takes zeros after the last frame of zstd for damage, and loses what it has decompressed by then.
Python's `lzma` takes zeros after a stream of xz for one that is cut short.
"""

from __future__ import annotations

import io
import lzma
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa

READ_BYTES = 64 << 10
XZ_MAGIC = b"\xfd7zXZ\x00"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
RLE_BLOCK = 1
"""A type of block, whose content is one byte, whatever its size."""


def is_zstd(magic: bytes) -> bool:
    """Return whether a file begins with a frame of zstd; `pzstd` begins with a skippable one."""
    return magic.startswith(ZSTD_MAGIC) or _is_skippable(magic)


def _is_skippable(magic: bytes) -> bool:
    return magic[1:4] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5


class XzStream(io.RawIOBase):
    """The content of streams of xz."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decompressor: lzma.LZMADecompressor | None = None
        self._next = b""
        self._is_end = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._is_end:
            if self._decompressor is None or self._decompressor.eof:
                self._begin_stream()
                if self._is_end and self._next:
                    raise OSError(
                        "the file is damaged after the end of an xz stream; what follows was not read"
                    )
                continue
            given = self._next
            if self._decompressor.needs_input and not given:
                given = self._file.read(READ_BYTES)
                if not given:
                    raise EOFError("the file is cut short: the end of its xz stream is missing")
            self._next = b""
            content = self._decompressor.decompress(given, len(buffer))
            if content:
                buffer[: len(content)] = content
                return len(content)
        return 0

    def _begin_stream(self) -> None:
        rest = b"" if self._decompressor is None else self._decompressor.unused_data
        while not (rest := rest.lstrip(b"\0")) and (more := self._file.read(READ_BYTES)):
            rest = more
        rest += self._file.read(len(XZ_MAGIC)) if 0 < len(rest) < len(XZ_MAGIC) else b""
        self._is_end = self._decompressor is not None and not rest.startswith(XZ_MAGIC)
        self._decompressor, self._next = lzma.LZMADecompressor(lzma.FORMAT_XZ), rest


class ZstdStream(io.RawIOBase):
    """The content of frames of zstd."""

    def __init__(self, file: io.BufferedReader[Any]) -> None:
        self._frames = _Frames(file)
        self._stream = pa.CompressedInputStream(io.BufferedReader(self._frames, READ_BYTES), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        num_bytes = self._stream.readinto(buffer)
        if not num_bytes and self._frames.has_more:
            raise OSError("the file is damaged after the end of a zstd frame; what follows was not read")
        return num_bytes


class _Frames(io.RawIOBase):
    """The frames of a file with content, as they are stored."""

    def __init__(self, file: io.BufferedReader[Any]) -> None:
        self._file = file
        self._part = b""
        self._parts = self._read_parts()
        self.has_more = False
        """Whether something follows that is neither a frame nor zeros."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._part = self._part or next(self._parts, b"")
        num_bytes = min(len(buffer), len(self._part))
        buffer[:num_bytes], self._part = self._part[:num_bytes], self._part[num_bytes:]
        return num_bytes

    def _read_parts(self) -> Iterator[bytes]:
        while magic := self._file.read(4):
            if magic == bytes(4):
                while ahead := self._file.peek():
                    num_zeros = len(ahead) - len(ahead.lstrip(b"\0"))
                    if not num_zeros:
                        break
                    self._file.read(num_zeros)
            elif magic == ZSTD_MAGIC:
                yield magic
                yield from self._read_frame()
            elif _is_skippable(magic):
                left = int.from_bytes(self._file.read(4), "little")
                while left and (skipped := self._file.read(min(left, READ_BYTES))):
                    left -= len(skipped)
            elif magic.strip(b"\0"):
                self.has_more = True
                return

    def _read_frame(self) -> Iterator[bytes]:
        """Yield the parts of a frame (RFC 8878); if it is cut short, what there is of it."""
        descriptor = self._file.read(1)
        flags = int.from_bytes(descriptor, "little")
        is_single = flags >> 5 & 1
        num_bytes = (1 - is_single) + (0, 1, 2, 4)[flags & 3] + (is_single, 2, 4, 8)[flags >> 6]
        yield descriptor + self._file.read(num_bytes)
        is_last = False
        while not is_last:
            header = self._file.read(3)
            block = int.from_bytes(header, "little")
            is_last = bool(block & 1) or len(header) < 3
            yield header + self._file.read(1 if block >> 1 & 3 == RLE_BLOCK else block >> 3)
        if flags >> 2 & 1:
            yield self._file.read(4)
