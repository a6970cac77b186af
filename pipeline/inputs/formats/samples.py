"""The samples of a WebDataset tar: members that follow each other and share a key.

- A member's key is its path up to the first dot of its base name, and the rest is its extension
  (`a.b/0007.left.jpg` is `left.jpg` of `a.b/0007`).
- Every image of a sample is a row: `shot.2021.00.jpg` and `shot.2021.01.jpg` share a key and are two rows. If
  an image column is named, only the member with that extension is.
- A sample without an image is one row that says so. Texts and kept members belong to each row of the sample.
- If a key occurs again later with an image, it makes new rows.
- A member without an extension is an image if its first bytes say so; its key is its path.
- Other members without a key are counted. Hidden files, `__MACOSX` and WebDataset's own `__notes__` are not.

In version 1 of the row contract, a row is a sample with its first image, and names without extensions and
hidden folders are not looked at.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

from blip2_actor import Status
from pipeline.inputs.formats.seen_keys import SeenKeys
from pipeline.inputs.formats.tar import TAR_ERRORS, LinkTargets, TarEndsEarly, members
from pipeline.inputs.image_kinds import HEAD_BYTES, IMAGE_EXTENSIONS, IMAGE_EXTENSIONS_V1, looks_like_image
from pipeline.inputs.reader import ReadOptions
from pipeline.progress import count

_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_NAME_WITHOUT_EXTENSION = re.compile(r"(?:.*/)?[^./][^./]*", re.DOTALL)
_NOTE = re.compile(r"(.*/)?__[^/]*__(/.*)?", re.DOTALL)
_NOT_OF_A_SAMPLE = re.compile(r"(.*/)?(__MACOSX|@eaDir|PaxHeaders?(\.\d+)?|\.[^./][^/]*)/.*", re.DOTALL)
"""Folders of macOS, of disk stations and of old tars, and hidden ones."""


BY_CONTENT = "images without an extension"
"""What stands for the extension of a member whose name has none."""
MAX_HELD_IMAGES = 16
"""Images of a sample that wait for its other members. `clip.000000.jpg` and all that follow share a key, so a
sample may be a whole tar; it is yielded in parts as soon as its kept members are there."""


@dataclass(slots=True)
class ImageMember:
    """An image of a sample."""

    name: str
    extension: str
    image: bytes | None = None
    """None if the row is not wanted, or has failed."""
    status: Status | None = None
    error: str | None = None


@dataclass(slots=True)
class Sample:
    """Members with the same key that follow each other."""

    key: str
    first_row: int
    """Number of the row of the first image."""
    extensions: dict[str, None] = field(default_factory=dict)
    """Those of all members in their order, also of earlier parts of the sample."""
    images: list[ImageMember] = field(default_factory=list)
    members: dict[str, bytes] = field(default_factory=dict)
    """Content of the kept members and texts, by extension."""
    status: Status | None = None
    """Why a kept member or a text is not available; all rows of the sample then fail."""
    error: str | None = None
    is_continued: bool = False
    """Whether a part of the sample was yielded before."""

    @property
    def num_rows(self) -> int:
        return max(1, len(self.images))

    def next_part(self, first_row: int) -> Sample:
        """Return the sample without the images that were yielded."""
        return replace(self, first_row=first_row, images=[], is_continued=True)


class SampleReader:
    """Groups the members of a tar into samples, and reads the content of the wanted ones.

    Args:
        options: which members are the images, the texts and the kept ones.
        wants: whether the image of a row is read. The other rows are only counted.
    """

    def __init__(self, options: ReadOptions, wants: Callable[[int], bool]) -> None:
        self._options = options
        self._wants = wants
        self._image_extension = options.image_column and options.image_column.lower()
        self._takes_all_images = options.schema_version > 1 and self._image_extension is None
        self._image_extensions = IMAGE_EXTENSIONS if options.schema_version > 1 else IMAGE_EXTENSIONS_V1
        others = [*options.kept.values(), *options.texts.values()]
        self._other_extensions = {extension.lower() for extension in others}
        self._keys = SeenKeys()
        self._link_targets = LinkTargets()
        self._opened: tuple[tarfile.TarInfo, io.BufferedReader[Any]] | None = None
        """The last member that was looked at, not read yet: a compressed tar goes back to its first byte."""
        self.num_rows = 0
        self.misplaced: str | None = None
        """What is wrong if a kept member is not next to its sample, as one sentence."""
        self._num_left_out, self._first_left_out = 0, ""

    @property
    def note(self) -> str | None:
        """Which members were not read because their names have no extension, as one sentence."""
        if not self._num_left_out:
            return None
        number = count(self._num_left_out, "member")
        return f"not read: {number} without an extension; the first is {self._first_left_out}"

    def read(self, archive: tarfile.TarFile) -> Iterator[Sample]:
        """Yield the samples in order; each counts as one row for each of its images, or as one.

        Raises:
            TAR_ERRORS: the tar ends early or is damaged. The samples before that place were yielded.
        """
        sample: Sample | None = None
        is_in_sample = False
        try:
            for member in members(archive):
                is_in_sample = False
                key, extension = self._split_name(member, archive)
                if key is None:
                    continue
                if sample is None or key != sample.key or extension in sample.extensions:
                    if sample is not None and self._count_rows(sample):
                        yield sample
                    sample = Sample(key, self.num_rows)
                elif len(sample.images) >= MAX_HELD_IMAGES and self._has_kept(sample):
                    if self._count_rows(sample):
                        yield sample
                    sample = sample.next_part(self.num_rows)
                sample.extensions[extension] = None
                is_in_sample = True
                self._take(sample, extension, member, archive)
        except TAR_ERRORS as error:
            # The last sample counts if nothing that was asked for can be missing from it: an image and its
            # kept members are there, and they are whole. Only the next header shows that a member is whole.
            if sample is not None:
                if is_in_sample and not isinstance(error, TarEndsEarly):
                    self._drop_last_member(sample)
                if sample.images and self._has_kept(sample) and self._count_rows(sample):
                    yield sample
            raise
        if sample is not None and self._count_rows(sample):
            yield sample

    def _has_kept(self, sample: Sample) -> bool:
        """Return whether the kept members and texts of a sample have been found."""
        return self._other_extensions <= sample.extensions.keys()

    def _split_name(self, member: tarfile.TarInfo, archive: tarfile.TarFile) -> tuple[str | None, str]:
        """Return the key and the lower-case extension of a member; the key is None if no sample has it.

        Without an extension it is an image or is counted, unless a program has left it there.
        """
        has_no_extension = _NAME_WITHOUT_EXTENSION.fullmatch(member.name)
        if _NOTE.fullmatch(member.name) or (
            (has_no_extension or self._options.schema_version > 1) and _NOT_OF_A_SAMPLE.fullmatch(member.name)
        ):
            return None, ""
        if not has_no_extension:
            found = _NAME.fullmatch(member.name)
            return (found[1], found[2].lower()) if found else (None, "")
        is_looked_at = self._takes_all_images and member.isreg()
        if is_looked_at:
            content = cast("io.BufferedReader[Any]", archive.extractfile(member))
            self._opened = member, content
            if looks_like_image(content.peek(HEAD_BYTES)):
                return member.name, BY_CONTENT
        self._first_left_out = self._first_left_out or member.name
        self._num_left_out += 1
        return None, ""

    def _drop_last_member(self, sample: Sample) -> None:
        """Forget the last member of a sample, whose content is not whole."""
        last, _ = sample.extensions.popitem()
        if sample.images and sample.images[-1].extension == last:
            sample.images.pop()

    def _count_rows(self, sample: Sample) -> bool:
        """Count the rows of a sample, and return True; return False if it has none.

        Members without an image are not a row if their key was counted before: they belong to that sample.
        """
        if not sample.images and sample.is_continued:
            return False
        if not sample.images and sample.key in self._keys:
            late = self._other_extensions.intersection(sample.extensions)
            if late:
                self.misplaced = self.misplaced or (
                    f"{sample.key}.{min(late)} is not next to the other members of its sample, so it "
                    "could not be kept; sort the tar by name"
                )
            return False
        self._keys.add(sample.key)
        self.num_rows += sample.num_rows
        return True

    def _take(
        self, sample: Sample, extension: str, member: tarfile.TarInfo, archive: tarfile.TarFile
    ) -> None:
        """Read a member if the sample needs it, or note why it cannot be read."""
        is_image = self._is_image(sample, extension)
        row = sample.first_row + len(sample.images)
        if is_image:
            sample.images.append(ImageMember(member.name, extension))
        # A kept member may come before the image of the row that is wanted.
        is_kept = extension in self._other_extensions
        if not (is_image and self._wants(row)) and not is_kept:
            return
        content, status, error = self._read(member, archive)
        if is_image:
            image = sample.images[-1]
            image.image, image.status, image.error = content, status, error
        if is_kept and content is not None:
            sample.members[extension] = content
        elif is_kept and not is_image:
            sample.status, sample.error = status, error

    def _read(
        self, member: tarfile.TarInfo, archive: tarfile.TarFile
    ) -> tuple[bytes | None, Status | None, str | None]:
        """Return the content of a member, or the status and the sentence that tell why there is none."""
        found = member
        if member.islnk() and self._options.schema_version > 1:
            target = self._link_targets.find(archive, member)
            if target is None:
                error = (
                    f"{member.name} is a hard link to {member.linkname}, which is not before it in the tar, "
                    "or the tar is compressed; write the tar with --hard-dereference"
                )
                return None, Status.UNREADABLE, error
            found = target
        if found.size > self._options.max_image_bytes:
            error = f"{member.name} has {found.size} bytes, more than {self._options.max_image_bytes}"
            return None, Status.TOO_LARGE, error
        if not found.isreg():
            error = f"{member.name} is a link or device, which is not followed inside a tar"
            return None, Status.UNREADABLE, error
        opened, self._opened = self._opened, None
        if opened is not None and opened[0] is found:
            return opened[1].read(), None, None
        return cast("io.BufferedReader[Any]", archive.extractfile(found)).read(), None, None

    def _is_image(self, sample: Sample, extension: str) -> bool:
        """Return whether the next member of a sample is an image that makes a row."""
        if sample.images and not self._takes_all_images:
            return False
        if self._image_extension is not None:
            return extension == self._image_extension
        return extension == BY_CONTENT or extension.rpartition(".")[2] in self._image_extensions
