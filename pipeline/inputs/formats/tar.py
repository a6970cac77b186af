"""Read tars once, from front to back, and detect whether they are whole.

Python's `tarfile` ends an archive at the first header that it cannot read, and takes a truncated tar for a
whole one. Here only the end-of-archive mark is the end; anything else is an error that says at which byte
the tar is cut or damaged.
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
from typing import IO, Any, cast

from pipeline.errors import InputError
from pipeline.inputs.formats.compressed import (
    READ_BYTES,
    XZ_MAGIC,
    PartsStream,
    decompress_xz,
    decompress_zstd,
    is_zstd,
)
from pipeline.inputs.shards import Shard
from pipeline.storage.retrying_file import open_below

BUFFER_BYTES = 4 << 20
"""Read-ahead: bytes per request to an object store, which answers after tens of milliseconds."""
MAX_PADDING_BYTES = 1 << 20
"""Tars are padded with zeros to 10 KiB, or to a tape's block. More zeros are a file that was never filled."""


class TarEndsEarly(Exception):
    """The archive stops where a header or the end-of-archive mark is expected."""


TAR_ERRORS = (TarEndsEarly, InputError, OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError)
"""Exceptions of opening and reading a tar that are caused by the file or by its storage."""


@contextmanager
def open_tar(shard: Shard) -> Iterator[tarfile.TarFile]:
    with open_file(shard) as file:
        yield open_archive(file)


@contextmanager
def open_file(shard: Shard, buffer_bytes: int = BUFFER_BYTES) -> Iterator[io.BufferedReader[io.RawIOBase]]:
    """Open the file of a tar or a manifest as it is stored, compressed or not."""
    with open_below(shard.root, shard.files[0]) as source:
        yield io.BufferedReader(cast(io.RawIOBase, source), buffer_bytes)


def open_archive(file: io.BufferedReader[io.RawIOBase]) -> tarfile.TarFile:
    """Open the archive in a file, compressed or not, for reading in order."""
    return tarfile.TarFile(fileobj=_decompress(file), tarinfo=_Header, encoding="utf-8")


def _decompress(file: io.BufferedReader[io.RawIOBase]) -> IO[bytes]:
    """Decompress a file. Its first bytes tell the compression, whatever the file is called."""
    magic = file.peek(6)[:6]
    if magic.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if magic.startswith(b"BZh"):
        return bz2.BZ2File(file)
    if magic.startswith(XZ_MAGIC):
        return _buffered(decompress_xz(file))
    if is_zstd(magic):
        return _buffered(decompress_zstd(file))
    return file


def _buffered(content: Iterator[bytes]) -> io.BufferedReader[Any]:
    return io.BufferedReader(PartsStream(content), READ_BYTES)


def members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of all members that are not folders."""
    while (member := _next(archive)) is not None:
        # The archive would keep every header in memory; the stubs of tarfile lack the attribute.
        archive.members = []  # type: ignore[attr-defined]
        if not member.isdir():
            yield member


def _next(archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return archive.next()
    except (ValueError, OverflowError) as error:  # The header gives an impossible size.
        reason = f"the tar is damaged before byte {archive.offset} ({error}); what follows was not read"
        raise tarfile.ReadError(reason) from None


class LinkTargets:
    """Finds the members that hard links repeat: GNU tar writes the second of two linked files as a link.

    Only a tar that has links is read twice, and its names are kept then.
    """

    def __init__(self) -> None:
        self._members: Iterator[tarfile.TarInfo] | None = None
        self._by_name: dict[str, tarfile.TarInfo] = {}

    def find(self, archive: tarfile.TarFile, link: tarfile.TarInfo) -> tarfile.TarInfo | None:
        """Return the earlier member that a link repeats, or None; a compressed tar is not read backwards."""
        file = archive.fileobj
        if not isinstance(file, io.BufferedReader) or isinstance(file.raw, PartsStream):
            return None
        position = file.tell()
        if self._members is None:
            file.seek(0)
            self._members = members(open_archive(file))
        for member in self._members:
            if member.isreg():
                self._by_name[member.name] = member
            if member.offset >= link.offset:
                break
        file.seek(position)
        return self._by_name.get(link.linkname)


def check_after_end(archive: tarfile.TarFile) -> str | None:
    """Read what follows the end-of-archive mark and say what is wrong with it, if anything.

    Reading to the end also verifies the checksums of a compressed file.
    """
    file = cast(IO[bytes], archive.fileobj)
    num_zeros = 0
    while block := file.read(BUFFER_BYTES):
        if block.count(0) < len(block):
            return "data follows the end-of-archive mark; join tars with `tar --concatenate` or name each"
        num_zeros += len(block)
    # `tar -b 8192` fills a last record of 4 MiB: the size is a multiple of that then.
    size = file.tell()
    if num_zeros > max(MAX_PADDING_BYTES, size & -size):
        return f"the tar ends in {num_zeros} bytes of zeros; it was probably not copied to its end"
    return None


_GNU_MAGIC = b"ustar  \0"
"""Magic of headers by GNU tar, which hold times where others hold the beginning of a long name."""

_EXTENDING_TYPES = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
"""Types of headers that extend the next one, for example by a long name."""
MAX_EXTENSION_BYTES = 1 << 20
"""Maximum size of such a header, as in libarchive."""


class _Header(tarfile.TarInfo):
    """Reads headers like `tarfile`, but does not take a cut or damage for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # The stubs of tarfile lack it.
            raise  # The end-of-archive mark.
        except (tarfile.HeaderError, ValueError, OverflowError, RecursionError) as error:
            # The other errors: a field is not a number, or hundreds of headers in a row extend the next one.
            reason = "too many headers for one member" if isinstance(error, RecursionError) else error
            raise TarEndsEarly(
                f"the tar is cut short or damaged at byte {archive.offset}, where a header or the "
                f"end-of-archive mark is expected ({reason}); what follows was not read"
            ) from None

    def _proc_member(self, archive: tarfile.TarFile) -> _Header:
        """Read what a header announces, if it is not too much to be held in memory."""
        if self.type in _EXTENDING_TYPES and self.size > MAX_EXTENSION_BYTES:
            raise tarfile.HeaderError(f"a header for the next one has {self.size} bytes")
        return cast(_Header, super()._proc_member(archive))  # type: ignore[misc]  # As `_block`.

    def _block(self, count: int) -> int:
        """Return the bytes that content takes with its padding; newer versions of `tarfile` check it too."""
        if count < 0:
            raise tarfile.HeaderError("negative size")  # It would lead back, and reading would never end.
        return super()._block(count)  # type: ignore[misc]  # The stubs of tarfile lack it.

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        """Parse name, size and type of an ordinary header, in a third of the time of `tarfile`."""
        if (
            len(buf) == tarfile.BLOCKSIZE
            and buf[156] in b"0x"
            and buf[257:262] == b"ustar"
            and buf[124] < 128
        ):
            try:
                if int(buf[148:156].strip(b" \0"), 8) == sum(buf) - sum(buf[148:156]) + 8 * ord(" "):
                    name, prefix = (part.partition(b"\0")[0] for part in (buf[:100], _prefix(buf)))
                    header = cls((prefix + b"/" + name if prefix else name).decode(encoding, errors))
                    header.size = int(buf[124:136].strip(b" \0") or b"0", 8)
                    header.type = bytes(buf[156:157])
                    return header
            except ValueError:
                pass  # Not an ordinary header.
        header = super().frombuf(buf, encoding, errors)
        if buf[257:265] == _GNU_MAGIC and header.type not in tarfile.GNU_TYPES:
            header.name = buf[:100].partition(b"\0")[0].decode(encoding, errors)
        return header


def _prefix(buf: bytes | bytearray) -> bytes | bytearray:
    """Return the field with the beginning of a long name; empty if the header has none."""
    return b"" if buf[257:265] == _GNU_MAGIC else buf[345:500]
