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
"""Bytes of a stream that are read at once. Damage costs content before it too: of xz up to as many bytes, and
of zstd up to 1 MiB, which Arrow decompresses at once."""
XZ_MAGIC = b"\xfd7zXZ\x00"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
RLE_BLOCK = 1
"""A type of block, whose content is one byte, whatever its size."""


class PartsStream(io.RawIOBase):
    """A stream whose bytes come in parts. It can be read, and skipped forward.

    After an error of the parts, nothing may be read any more: it would look like the end.
    """

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts = parts
        self._part = b""
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._part = self._part or next(filter(None, self._parts), b"")
        num_bytes = min(len(buffer), len(self._part))
        buffer[:num_bytes], self._part = self._part[:num_bytes], self._part[num_bytes:]
        self._position += num_bytes
        return num_bytes

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or position < self._position:
            raise OSError(f"the stream cannot go back from byte {self._position} to byte {position}")
        while self._position < position and self.read(min(position - self._position, READ_BYTES)):
            pass
        return self._position


def is_zstd(magic: bytes) -> bool:
    """Return whether a file begins with a frame of zstd; `pzstd` begins with a skippable one."""
    return magic.startswith(ZSTD_MAGIC) or _is_skippable(magic)


def _is_skippable(magic: bytes) -> bool:
    return magic[1:4] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5


def decompress_xz(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the content of streams of xz."""
    stored = file.read(READ_BYTES)
    while stored:
        stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)
        while not stream.eof:
            if stream.needs_input and not stored and not (stored := file.read(READ_BYTES)):
                raise EOFError("the file is cut short: the end of its xz stream is missing")
            yield stream.decompress(stored, READ_BYTES)
            stored = b""
        stored = stream.unused_data
        while not (stored := stored.lstrip(b"\0")) and (more := file.read(READ_BYTES)):
            stored = more
        stored += file.read(len(XZ_MAGIC)) if 0 < len(stored) < len(XZ_MAGIC) else b""
        if stored and not stored.startswith(XZ_MAGIC):
            raise OSError("the file is damaged after the end of an xz stream; what follows was not read")


def decompress_zstd(file: io.BufferedReader[Any]) -> Iterator[bytes]:
    """Yield the content of frames of zstd."""
    frames = _Frames(file)
    stream = pa.CompressedInputStream(io.BufferedReader(PartsStream(frames.read()), READ_BYTES), "zstd")
    while content := stream.read(READ_BYTES):
        yield content
    if frames.has_more:
        raise OSError("the file is damaged after the end of a zstd frame; what follows was not read")


class _Frames:
    """The frames of a file with content, as they are stored."""

    def __init__(self, file: io.BufferedReader[Any]) -> None:
        self._file = file
        self.has_more = False
        """Whether something follows that is neither a frame nor zeros."""

    def read(self) -> Iterator[bytes]:
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
