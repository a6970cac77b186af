"""WebDataset tars: members that follow each other and share a key are one sample, one row.

A member's key is its path up to the first dot of its base name, the rest is its extension
(`a.b/0007.left.jpg` is `left.jpg` of `a.b/0007`). Of several images in a sample the first in the
archive is taken. A key that comes again with an image is a row of its own. What has no key
(folders, `.hidden`, `README`) and WebDataset's own `__notes__` are not samples.

Python's tarfile ends an archive at the first header it cannot read, and takes a cut there for the
end. Here only the end-of-archive mark is an end; anything else gives a partial shard, whose rows
are exactly the first rows of the whole one. Nothing after damage is read, or rows would be
renumbered when the tar is repaired.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, cast

import pyarrow as pa

from blip2_actor import Status
from pipeline.formats.rows import TableBuilder
from pipeline.reading import IMAGE_EXTENSIONS, ReadOptions, ShardReport, ShardWork, Tables
from pipeline.shards import InputError, Shard
from pipeline.storage import join, open_filesystem

BUFFER_BYTES = 4 << 20
"""Read-ahead: one request to an object store, which answers after tens of milliseconds, brings so much."""
MAX_PADDING_BYTES = 1 << 20
"""Tars are padded with zeros to 10 KiB, or to a tape's block; more is a file that was never filled."""

_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_NOTE = re.compile(r"(.*/)?__[^/]*__(/.*)?", re.DOTALL)


class _EndsEarly(Exception):
    """The archive stops where a header or the end-of-archive mark should stand."""


_DAMAGE = (_EndsEarly, InputError, OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError)


def read(work: ShardWork, options: ReadOptions) -> Tables:
    """Give the samples asked for; a tar that ends early or is damaged is read as far as it goes."""
    shard, table = work.shard, TableBuilder(work.shard.name, options)
    samples = _Samples(options, work.wants)
    reason = None
    try:
        with _open_tar(shard) as archive:
            for sample in samples.of(archive):
                if work.wants(sample.row):
                    _add(table, sample)
                    if table.full:
                        yield table.take()
                if samples.num_rows == shard.max_rows:
                    break
            else:
                reason = samples.stray or _what_follows(archive)
    except _DAMAGE as error:
        reason = str(error) or type(error).__name__
    if len(table):
        yield table.take()
    return ShardReport(
        shard=shard.name,
        num_rows=samples.num_rows,
        complete=reason is None,
        reason=reason and f"{shard.uri}: {reason}",
    )


def count_rows(shard: Shard, at_most: int) -> int:
    """Count the samples of a tar by its headers, up to a number."""
    samples = _Samples(ReadOptions(), lambda row: False)
    try:
        with _open_tar(shard) as archive:
            for _ in samples.of(archive):
                if samples.num_rows == at_most:
                    break
    except _DAMAGE:
        pass  # Reading it will say what is wrong; what can be read counts.
    return samples.num_rows


@dataclass(slots=True)
class _Sample:
    key: str
    row: int
    extensions: list[str] = field(default_factory=list)
    members: dict[str, bytes] = field(default_factory=dict)
    """Content of the members that are kept, by extension."""
    image_extension: str | None = None
    image: bytes | None = None
    status: Status | None = None
    error: str | None = None


class _Samples:
    """Groups members into samples and reads the content of those that are wanted."""

    def __init__(self, options: ReadOptions, wants: Callable[[int], bool]) -> None:
        self._options = options
        self._wants = wants
        self._image = options.image_column and options.image_column.lower()
        others = [*options.kept.values(), *filter(None, [options.prompt_column])]
        self._others = {extension.lower() for extension in others}
        self._keys: set[str] = set()
        self.num_rows = 0
        self.stray: str | None = None
        """Says so when members that are kept stand apart from their sample."""

    def of(self, archive: tarfile.TarFile) -> Iterator[_Sample]:
        sample: _Sample | None = None
        try:
            for member in _members(archive):
                key, extension = split_name(member.name)
                if key is None:
                    continue
                if sample is None or key != sample.key or extension in sample.extensions:
                    if sample is not None and self._is_row(sample):
                        yield sample
                    sample = _Sample(key, self.num_rows)
                sample.extensions.append(extension)
                self._take(sample, extension, member, archive)
        except _DAMAGE as error:
            # The last sample counts when nothing asked for can be missing from it: its image and the
            # members kept are there, and whole, which of the last member only a next header shows.
            if sample is not None:
                if not isinstance(error, _EndsEarly):
                    sample.extensions.pop()
                if {sample.image_extension, *self._others} <= {*sample.extensions} and self._is_row(sample):
                    yield sample
            raise
        if sample is not None and self._is_row(sample):
            yield sample

    def _is_row(self, sample: _Sample) -> bool:
        """Count the sample, unless it is more members, but no image, of one that was counted."""
        if sample.image_extension is None and sample.key in self._keys:
            late = self._others.intersection(sample.extensions)
            if late:
                self.stray = self.stray or (
                    f"{sample.key}.{min(late)} stands apart from the other members of its sample, so it "
                    "could not be kept; sort the tar by name"
                )
            return False
        self._keys.add(sample.key)
        self.num_rows += 1
        return True

    def _take(
        self, sample: _Sample, extension: str, member: tarfile.TarInfo, archive: tarfile.TarFile
    ) -> None:
        is_image = sample.image_extension is None and self._names_image(extension)
        if is_image:
            sample.image_extension = extension
        if not (is_image or extension in self._others) or not self._wants(sample.row):
            return
        if member.size > self._options.max_image_bytes:
            sample.status = Status.TOO_LARGE
            sample.error = f"{member.name} has {member.size} bytes, more than {self._options.max_image_bytes}"
        elif not member.isreg():
            sample.status = Status.UNREADABLE
            sample.error = f"{member.name} is a link or device, which is not followed inside a tar"
        else:
            content = cast(IO[bytes], archive.extractfile(member)).read()
            if is_image:
                sample.image = content
            if extension in self._others:
                sample.members[extension] = content

    def _names_image(self, extension: str) -> bool:
        if self._image is not None:
            return extension == self._image
        return extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def _add(table: TableBuilder, sample: _Sample) -> None:
    image, status, error = sample.image, sample.status, sample.error
    if status is not None:
        image = None
    elif sample.image_extension is None:
        status = Status.MISSING_IMAGE
        error = f"the sample has no image among its members: {', '.join(sample.extensions)}"
    elif not image:
        image, status = None, Status.MISSING_IMAGE
        error = f"{sample.key}.{sample.image_extension} is empty"
    table.add(sample.row, sample.key, image=image, status=status, error=error, members=sample.members)


def split_name(name: str) -> tuple[str | None, str]:
    """Key and lower-case extension of a member's name; no key when it belongs to no sample."""
    found = _NAME.fullmatch(name)
    if found is None or _NOTE.fullmatch(name):
        return None, ""
    return found[1], found[2].lower()


class _Header(tarfile.TarInfo):
    """Reads headers like tarfile, but does not pass off a cut or damage as the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Header:
        try:
            return cast(_Header, super().fromtarfile(archive))
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # The end-of-archive mark.
        except tarfile.HeaderError as error:
            raise _EndsEarly(
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
        return cast(_Header, super().frombuf(buf, encoding, errors))


@contextmanager
def _open_tar(shard: Shard) -> Iterator[tarfile.TarFile]:
    filesystem, root = open_filesystem(shard.root)
    with filesystem.open_input_file(join(root, shard.files[0])) as source:
        file = io.BufferedReader(cast(io.RawIOBase, source), BUFFER_BYTES)
        content = _decompressed(file)
        yield tarfile.TarFile(fileobj=content, tarinfo=_Header, encoding="utf-8")


def _decompressed(file: io.BufferedReader) -> IO[bytes]:
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


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := archive.next()) is not None:
        archive.members = []  # It would remember every member.
        if not member.isdir():
            yield member


def _what_follows(archive: tarfile.TarFile) -> str | None:
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
