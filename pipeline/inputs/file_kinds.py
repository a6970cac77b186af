"""Choose which files of an input are read: tars, Parquet tables or images.

Folders often hold more than the input: tables of metadata next to tars, statistics, logs. So only one kind
of file is read from a folder or a glob, and an input with two kinds is refused unless `--format` decides.
Files that are not read are counted, so that nothing is skipped silently. What a run has written is never an
input, unless its files are named one by one.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from pipeline.errors import InputError
from pipeline.inputs.find_files import FoundFiles
from pipeline.inputs.formats.endings import format_of, without_ending
from pipeline.inputs.formats.tables.own_outputs import tables_in_outputs, tables_of_runs
from pipeline.inputs.globs import Patterns
from pipeline.inputs.image_kinds import head_of, looks_like_image
from pipeline.inputs.shards import Format, Shard
from pipeline.progress import count
from pipeline.storage.file_table import FileTable
from pipeline.storage.filesystems import at_once, join, open_filesystem
from pipeline.storage.secrets import without_secrets

FORMAT_NOUNS: dict[Format, str] = {"webdataset": "tars", "parquet": "Parquet tables", "folder": "images"}
FORMATS: tuple[Format, ...] = tuple(FORMAT_NOUNS)
"""The formats that `--format` may name."""


@dataclass(frozen=True)
class Unread:
    """Files of an input that are not read."""

    by_ending: Mapping[str, int] = field(default_factory=dict)
    """How many there are of each ending."""
    num_own: int = 0
    """Files that an earlier run has written."""
    num_excluded: int = 0
    """Files that the user has excluded."""

    def __add__(self, other: Unread) -> Unread:
        by_ending = Counter(self.by_ending) + Counter(other.by_ending)
        return Unread(dict(by_ending), self.num_own + other.num_own, self.num_excluded + other.num_excluded)

    def lines(self) -> list[str]:
        """Say what is not read, if anything."""
        lines = []
        if self.by_ending:
            total = sum(self.by_ending.values())
            lines.append(f"{count(total, 'file')} not read: {_most_frequent(self.by_ending)}")
        if self.num_own:
            lines.append(f"left out: {count(self.num_own, 'file')} of an earlier run")
        if self.num_excluded:
            lines.append(f"left out: {count(self.num_excluded, 'file')} by --include and --exclude")
        return lines


@dataclass(frozen=True)
class Chosen:
    """How the files of one input are read."""

    files: dict[Format, FileTable]
    """The files that are read, by format."""
    unread: Unread


def choose_files(
    found: FoundFiles, wanted: str, known: Collection[Shard], patterns: Patterns, may_lack: bool
) -> Chosen:
    """Choose the files of an input that are read.

    Files that the user named one by one are all read. From a folder or a glob, the files of one format are
    read: the wanted one, or the only one there. img2dataset writes a table next to each tar (and next to
    each folder of images); these tables do not count. Files whose names have no ending are images if their
    first bytes say so.

    Args:
        found: the files of the input.
        wanted: a format, or "auto".
        known: the shards of an earlier listing. Their format decides for "auto" if it is one, and their files
            are not opened again.
        patterns: which files the user wants.
        may_lack: as for `find_files`.

    Raises:
        InputError: there is no file of the wanted format, or there are files of several formats.
    """
    all_files = found.files
    if patterns != Patterns():
        found = replace(found, files=all_files.select(patterns.take))
    num_excluded = len(all_files) - len(found.files)
    if found.one_by_one and wanted in FORMATS:
        return Chosen({wanted: found.files}, Unread(num_excluded=num_excluded))
    known_format = _only_format(known)
    root = without_secrets(found.root)
    known_files = {
        file
        for shard in known
        if without_secrets(shard.root) == root
        for file in shard.files
        if format_of(file) != "folder"
    }
    kinds = _Kinds(found, known_format if wanted == "auto" else wanted, known_files)
    own: set[str] = set()
    if found.one_by_one:
        _refuse_others(kinds)
        formats = set(kinds.counts)
    else:
        formats = _choose_formats(wanted, known_format, kinds)
        if "parquet" in formats:
            own = tables_of_runs(found.root, kinds.tables, known_files)
            kinds.leave_out(own)
        formats = {name for name in formats if kinds.counts[name]}
        _refuse_several(found, {name: kinds.counts[name] for name in formats})
    for name in formats:
        if kinds.counts[name] == len(found.files):  # Look at none of up to 10^8 files again.
            return Chosen({name: found.files}, Unread(num_excluded=num_excluded))
    left_out = [file for file in found.files if kinds.of(file) not in formats and file not in own]
    own |= tables_in_outputs(found.root, [file for file in left_out if format_of(file) == "parquet"])
    rest = _count_endings(file for file in left_out if file not in own)
    if not formats and not may_lack:
        _refuse_nothing(found, wanted, rest, len(own))

    def files_in(name: Format) -> FileTable:
        return found.files.select(lambda file: kinds.of(file) == name)

    files = {name: files_in(name) for name in formats}
    return Chosen(files, Unread(rest, len(own), num_excluded))


def _only_format(shards: Iterable[Shard]) -> Format | None:
    formats = {shard.format for shard in shards}
    return formats.pop() if len(formats) == 1 else None


class _Kinds:
    """What each file of an input is, by its name, or by its first bytes if the name has no ending."""

    def __init__(self, found: FoundFiles, wanted: str | None, known: Collection[str]) -> None:
        """Look at all files, and open none of the known ones."""
        self._found = found
        self._images: set[str] = set()
        self._left_out: set[str] = set()
        self.counts: Counter[Format] = Counter()
        self.tables: list[str] = []
        self.first_other: str | None = None
        """A file of no format."""
        unnamed = []
        for file in found.files:
            kind = self.of(file)
            if kind is not None:
                self.counts[kind] += 1
                self.tables += [file] if kind == "parquet" else []
            elif wanted in (None, "folder") and not posixpath.splitext(file)[1]:
                unnamed.append(file)
            else:
                self.first_other = self.first_other or file
        self._images = self._find_images(unnamed, known)
        self.counts += Counter({"folder": len(self._images)})
        self.first_other = self.first_other or next((f for f in unnamed if f not in self._images), None)

    def of(self, file: str) -> Format | None:
        """Return the format in which a file can be read, or None."""
        if file in self._images:
            return "folder"
        is_left_out = file in self._left_out or (not self._found.one_by_one and _belongs_to_a_tool(file))
        return None if is_left_out else format_of(file)

    def leave_out(self, tables: Collection[str]) -> None:
        """Take some tables out: they have no format from now on."""
        self._left_out.update(tables)
        self.tables = [table for table in self.tables if table not in self._left_out]
        self.counts["parquet"] = len(self.tables)

    def metadata(self) -> set[str]:
        """Return the tables that share their name with a tar or with a folder of images."""
        names: set[str] = set()
        for file in self._found.files:
            kind = self.of(file)
            if kind == "webdataset":
                names.add(without_ending(file))
            elif kind == "folder":
                names.add(posixpath.dirname(file))
        return {table for table in self.tables if without_ending(table) in names}

    def _find_images(self, unnamed: Sequence[str], known: Collection[str]) -> set[str]:
        new = [file for file in unnamed if file not in known]
        if not new:
            return set(unnamed)
        filesystem, base = open_filesystem(self._found.root)
        heads = at_once(partial(head_of, filesystem), [join(base, file) for file in new])
        return set(unnamed) - {f for f, head in zip(new, heads, strict=True) if not looks_like_image(head)}


def _belongs_to_a_tool(file: str) -> bool:
    """Whether a file is another tool's own, as those in `_delta_log/` and `_temporary/` are.

    An image is not, because cameras call their files `_DSC0001.JPG`.
    """
    return (file.startswith("_") or "/_" in file) and format_of(file) != "folder"


def _choose_formats(wanted: str, known: Format | None, kinds: _Kinds) -> set[Format]:
    """Choose the formats of a folder or a glob; tables next to other files may be their metadata."""
    formats = set(kinds.counts)
    if wanted != "auto":
        return formats & {wanted}
    if known in formats:
        return {known}
    if len(formats) > 1 and "parquet" in formats:
        kinds.leave_out(kinds.metadata())
    return formats


def _refuse_others(kinds: _Kinds) -> None:
    """Raise InputError if one of the files that were named one by one has no format."""
    if kinds.first_other is not None:
        raise InputError(
            f"the name {kinds.first_other} does not tell whether the file is a tar, a Parquet table or an "
            "image; if it lists images, put @ in front of its name; else leave it out, or say what it is "
            "with --format"
        )


def _refuse_several(found: FoundFiles, counts: Mapping[Format, int]) -> None:
    if len(counts) > 1:
        named = " and ".join(
            count(number, FORMAT_NOUNS[name].removesuffix("s")) for name, number in sorted(counts.items())
        )
        flags = " or ".join(f"--format {name}" for name in sorted(counts))
        raise InputError(
            f"{found.name} must hold one kind of file, got {named}; choose one with {flags}, "
            "or name each kind as an input of its own"
        )


def _refuse_nothing(found: FoundFiles, wanted: str, rest: Mapping[str, int], num_own: int) -> None:
    nouns = " or ".join(FORMAT_NOUNS[name] for name in FORMATS if wanted in ("auto", name))
    if not (rest or num_own):
        raise InputError(f"{found.name} holds no file that --include and --exclude take; change the patterns")
    if num_own:
        raise InputError(
            f"{found.name} holds no {nouns} but the output of an earlier run ({num_own:,} files); name "
            "another input, or name these files one by one to read them"
        )
    raise InputError(
        f"{found.name} holds no {nouns}, only {_most_frequent(rest)}; name another input or --format, "
        "or @FILE if one of them lists images"
    )


def _count_endings(files: Iterable[str]) -> dict[str, int]:
    return Counter(posixpath.splitext(file)[1].lower() or "without ending" for file in files)


def _most_frequent(endings: Mapping[str, int]) -> str:
    """Describe files by ending, six of them or five and the rest: `2 .json, 1 without ending`."""
    by_frequency = sorted(endings.items(), key=lambda entry: (-entry[1], entry[0]))
    num_named = len(by_frequency) if len(by_frequency) <= 6 else 5
    named = [f"{count:,} {ending}" for ending, count in by_frequency[:num_named]]
    others = sum(count for _, count in by_frequency[num_named:])
    return ", ".join([*named, *([f"{others:,} others"] if others else [])])
