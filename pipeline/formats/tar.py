"""Tars read once, from front to back, that know whether they were whole.

Python's tarfile ends an archive at the first header it cannot read, and takes a cut there for the
end. Here only the end-of-archive mark is an end.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

import pyarrow as pa

from pipeline.inputs.shards import InputError, Shard
from pipeline.storage.filesystems import join, open_filesystem
from pipeline.storage.retrying_file import open_input

BUFFER_BYTES = 4 << 20
"""Read-ahead: one request to an object store, which answers after tens of milliseconds, brings so much."""
MAX_PADDING_BYTES = 1 << 20
"""Tars are padded with zeros to 10 KiB, or to a tape's block; more is a file that was never filled."""


class EndsEarly(Exception):
    """The archive stops where a header or the end-of-archive mark should stand."""


DAMAGE = (EndsEarly, InputError, OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError)
"""What opening and reading a tar can raise when the file is to blame, or its storage."""


@contextmanager
def open_tar(shard: Shard) -> Iterator[tarfile.TarFile]:
    with open_file(shard) as file:
        yield untar(file)


@contextmanager
def open_file(shard: Shard) -> Iterator[io.BufferedReader[io.RawIOBase]]:
    """The tar as it is stored, maybe compressed."""
    filesystem, root = open_filesystem(shard.root)
    with open_input(filesystem, join(root, shard.files[0])) as source:
        yield io.BufferedReader(cast(io.RawIOBase, source), BUFFER_BYTES)


def untar(file: io.BufferedReader[io.RawIOBase]) -> tarfile.TarFile:
    return tarfile.TarFile(fileobj=_decompressed(file), tarinfo=_Header, encoding="utf-8")


def _decompressed(file: io.BufferedReader[io.RawIOBase]) -> IO[bytes]:
    """See through the compression that the first bytes tell, whatever the file is called."""
    magic = file.peek(6)[:6]
    if magic.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if magic.startswith(b"BZh"):
        return bz2.BZ2File(file)
    if magic.startswith(b"\xfd7zXZ\x00"):
        return lzma.LZMAFile(file)
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        return cast(IO[bytes], _Forward(pa.CompressedInputStream(file, "zstd")))
    return file


class _Forward:
    """A stream that can be read and skipped, which is all that reading a tar in order asks for."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self._stream = io.BufferedReader(cast(io.RawIOBase, stream), BUFFER_BYTES)
        self._at = 0

    def read(self, size: int = -1) -> bytes:
        content = self._stream.read(size)
        self._at += len(content)
        return content

    def tell(self) -> int:
        return self._at

    def seek(self, to: int) -> int:
        while self._at < to and self.read(min(to - self._at, BUFFER_BYTES)):
            pass
        return self._at


def members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined]  # It would remember every member.
        if not member.isdir():
            yield member


def what_follows(archive: tarfile.TarFile) -> str | None:
    """What is wrong behind the end-of-archive mark; reading it also checks a compressed file's sums."""
    file = cast(IO[bytes], archive.fileobj)
    num_zeros = 0
    while block := file.read(BUFFER_BYTES):
        if block.count(0) < len(block):
            return "more follows the end-of-archive mark; join tars with `tar --concatenate`, or name each"
        num_zeros += len(block)
    if num_zeros > MAX_PADDING_BYTES:
        return f"the tar ends in {num_zeros} bytes of zeros; it was probably never copied to its end"
    return None


class _Header(tarfile.TarInfo):
    """Reads headers like tarfile, but does not pass off a cut or damage as the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # The end-of-archive mark.
        except tarfile.HeaderError as error:
            raise EndsEarly(
                f"the tar is cut short or damaged at byte {archive.offset}, where a header or the "
                f"end-of-archive mark should stand ({error}); what follows was not read"
            ) from None

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        """Parse the ordinary header by itself: name, size and type, a third of tarfile's time."""
        if (
            len(buf) == tarfile.BLOCKSIZE
            and buf[156] in b"0x"
            and buf[257:262] == b"ustar"
            and buf[124] < 128
        ):
            try:
                if int(buf[148:156].strip(b" \0"), 8) == sum(buf) - sum(buf[148:156]) + 8 * ord(" "):
                    name, prefix = (part.partition(b"\0")[0] for part in (buf[:100], buf[345:500]))
                    header = cls((prefix + b"/" + name if prefix else name).decode(encoding, errors))
                    header.size = int(buf[124:136].strip(b" \0") or b"0", 8)
                    header.type = bytes(buf[156:157])
                    return header
            except ValueError:
                pass  # Not so ordinary.
        return super().frombuf(buf, encoding, errors)
