"""WebDataset tars: members that follow each other and share a key are one sample, one row.

A member's key is its path up to the first dot of its base name, the rest is its extension
(`a.b/0007.left.jpg` is `left.jpg` of `a.b/0007`). Of several images in a sample the first in the
archive is taken. A key that comes again with an image is a row of its own. What has no key
(folders, `.hidden`, `README`) and WebDataset's own `__notes__` are not samples.

The rows of a tar that ends early are exactly the first rows of the whole one. Nothing after damage
is read, or rows would be renumbered when the tar is repaired.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, cast

from blip2_actor import Status
from pipeline.formats.rows import TableBuilder
from pipeline.formats.tar import DAMAGE, EndsEarly, members, open_file, open_tar, untar, what_follows
from pipeline.inputs.reader import IMAGE_EXTENSIONS, ReadOptions, ShardReport, ShardWork, Tables
from pipeline.inputs.shards import Shard

_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_NOTE = re.compile(r"(.*/)?__[^/]*__(/.*)?", re.DOTALL)


def read(work: ShardWork, options: ReadOptions) -> Tables:
    """Give the samples asked for; a tar that ends early or is damaged is read as far as it goes."""
    shard, table = work.shard, TableBuilder(work.shard.name, options)
    samples = _Samples(options, work.wants)
    reason = None
    try:
        with open_tar(shard) as archive:
            for sample in samples.of(archive):
                if work.wants(sample.row):
                    _add(table, sample)
                    if table.full:
                        yield table.take()
                if samples.num_rows == shard.max_rows:
                    break
            else:
                reason = samples.stray or what_follows(archive)
    except DAMAGE as error:
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
    return first_rows(shard, at_most)[0]


def first_rows(shard: Shard, at_most: int) -> tuple[int, int | None]:
    """Walk the first samples of a tar.

    Returns:
        How many there are, up to the number, and the bytes of the file that they take: None when the
        file holds no more than these.
    """
    samples = _Samples(ReadOptions(), lambda row: False)
    try:
        with open_file(shard) as file:
            for _ in samples.of(untar(file)):
                if samples.num_rows == at_most:
                    # The header of the next sample has been read.
                    return at_most, max(1, file.tell() - tarfile.BLOCKSIZE)
    except DAMAGE:
        pass  # Reading it will say what is wrong; what can be read counts.
    return samples.num_rows, None


def first_members(shard: Shard, at_most: int) -> list[list[str]]:
    """The extensions of the members of the first samples of a tar; none where it cannot be read."""
    found: list[list[str]] = []
    try:
        with open_tar(shard) as archive:
            for sample in _Samples(ReadOptions(), lambda row: False).of(archive):
                found.append(sample.extensions)
                if len(found) == at_most:
                    break
    except DAMAGE:
        pass  # Reading it will say what is wrong.
    return found


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
        others = [*options.kept.values(), *options.texts.values()]
        self._others = {extension.lower() for extension in others}
        self._keys: set[str] = set()
        self.num_rows = 0
        self.stray: str | None = None
        """Says so when members that are kept stand apart from their sample."""

    def of(self, archive: tarfile.TarFile) -> Iterator[_Sample]:
        sample: _Sample | None = None
        try:
            for member in members(archive):
                key, extension = split_name(member.name)
                if key is None:
                    continue
                if sample is None or key != sample.key or extension in sample.extensions:
                    if sample is not None and self._is_row(sample):
                        yield sample
                    sample = _Sample(key, self.num_rows)
                sample.extensions.append(extension)
                self._take(sample, extension, member, archive)
        except DAMAGE as error:
            # The last sample counts when nothing asked for can be missing from it: its image and the
            # members kept are there, and whole, which of the last member only a next header shows.
            if sample is not None:
                if not isinstance(error, EndsEarly):
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
