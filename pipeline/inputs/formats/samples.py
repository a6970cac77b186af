"""The samples of a WebDataset tar: members that follow each other and share a key are one sample, one row.

- A member's key is its path up to the first dot of its base name, and the rest is its extension
  (`a.b/0007.left.jpg` is `left.jpg` of `a.b/0007`).
- If a sample has several images, the first one in the archive is taken.
- If a key occurs again with an image, that is a row of its own.
- Members without a key (folders, `.hidden`, `README`) and WebDataset's own `__notes__` are no samples.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, cast

from blip2_actor import Status
from pipeline.inputs.formats.tar import TAR_ERRORS, TarEndsEarly, members
from pipeline.inputs.image_kinds import IMAGE_EXTENSIONS_V1 as IMAGE_EXTENSIONS
from pipeline.inputs.reader import ReadOptions

_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_NOTE = re.compile(r"(.*/)?__[^/]*__(/.*)?", re.DOTALL)


@dataclass(slots=True)
class Sample:
    """One row as its members are found."""

    key: str
    row: int
    extensions: list[str] = field(default_factory=list)
    members: dict[str, bytes] = field(default_factory=dict)
    """Content of the kept members and texts, by extension."""
    image_extension: str | None = None
    image: bytes | None = None
    status: Status | None = None
    error: str | None = None


class SampleReader:
    """Groups the members of a tar into samples, and reads the content of the wanted ones.

    Args:
        options: which members are the image, the texts and the kept ones.
        wants: whether the content of a row is read. The other rows are only counted.
    """

    def __init__(self, options: ReadOptions, wants: Callable[[int], bool]) -> None:
        self._options = options
        self._wants = wants
        self._image_extension = options.image_column and options.image_column.lower()
        others = [*options.kept.values(), *options.texts.values()]
        self._other_extensions = {extension.lower() for extension in others}
        self._keys: set[str] = set()
        self.num_rows = 0
        self.misplaced: str | None = None
        """What is wrong if a kept member is not next to its sample, as one sentence."""

    def read(self, archive: tarfile.TarFile) -> Iterator[Sample]:
        """Yield the samples in order; each counts as a row.

        Raises:
            TAR_ERRORS: the tar ends early or is damaged. The samples before that place were yielded.
        """
        sample: Sample | None = None
        try:
            for member in members(archive):
                key, extension = split_name(member.name)
                if key is None:
                    continue
                if sample is None or key != sample.key or extension in sample.extensions:
                    if sample is not None and self._count_row(sample):
                        yield sample
                    sample = Sample(key, self.num_rows)
                sample.extensions.append(extension)
                self._take(sample, extension, member, archive)
        except TAR_ERRORS as error:
            # The last sample counts if nothing that was asked for can be missing from it: its image and
            # its kept members are there, and they are whole. Only the next header shows that a member is.
            if sample is not None:
                if not isinstance(error, TarEndsEarly):
                    sample.extensions.pop()
                needed = {sample.image_extension, *self._other_extensions}
                if needed <= {*sample.extensions} and self._count_row(sample):
                    yield sample
            raise
        if sample is not None and self._count_row(sample):
            yield sample

    def _count_row(self, sample: Sample) -> bool:
        """Count a sample as a row, and return True; return False if it is not a row.

        Members without an image are not a row if their key was counted before: they belong to that sample.
        """
        if sample.image_extension is None and sample.key in self._keys:
            late = self._other_extensions.intersection(sample.extensions)
            if late:
                self.misplaced = self.misplaced or (
                    f"{sample.key}.{min(late)} is not next to the other members of its sample, so it "
                    "could not be kept; sort the tar by name"
                )
            return False
        self._keys.add(sample.key)
        self.num_rows += 1
        return True

    def _take(
        self, sample: Sample, extension: str, member: tarfile.TarInfo, archive: tarfile.TarFile
    ) -> None:
        """Read a member if the sample needs it, or note why it cannot be read."""
        is_image = sample.image_extension is None and self._is_image(extension)
        if is_image:
            sample.image_extension = extension
        if not (is_image or extension in self._other_extensions) or not self._wants(sample.row):
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
            if extension in self._other_extensions:
                sample.members[extension] = content

    def _is_image(self, extension: str) -> bool:
        if self._image_extension is not None:
            return extension == self._image_extension
        return extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def split_name(name: str) -> tuple[str | None, str]:
    """Split a member's name into key and lower-case extension; the key is None if it is no sample's."""
    found = _NAME.fullmatch(name)
    if found is None or _NOTE.fullmatch(name):
        return None, ""
    return found[1], found[2].lower()
