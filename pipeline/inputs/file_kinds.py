"""Choose which files of an input are read: tars, Parquet tables or images.

Folders often hold more than the input: tables of metadata next to tars, statistics, logs. So of a folder
or a glob one kind of file is read, and an input with two kinds is refused unless `--format` decides. What is
not read is counted, so that nothing is passed over without a word. What a run has written is never an input,
unless its files are named one by one.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.errors import InputError
from pipeline.inputs.find_files import Files, FoundFiles
from pipeline.inputs.formats.tables import parquet
from pipeline.inputs.globs import Patterns
from pipeline.inputs.image_kinds import HEAD_BYTES, IMAGE_EXTENSIONS, looks_like_image
from pipeline.inputs.shards import Format, Shard, without_secrets
from pipeline.progress import count
from pipeline.schema import FINGERPRINT_KEY
from pipeline.storage.filesystems import MAX_CONCURRENT_REQUESTS, join, open_filesystem

FILE_ENDINGS: dict[Format, tuple[str, ...]] = {
    "webdataset": (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst"),
    "parquet": (".parquet", ".pq"),
    "folder": tuple(f".{extension}" for extension in IMAGE_EXTENSIONS),
}
"""The endings of file names that tell the format of a file. Upper and lower case are the same."""
FORMAT_NOUNS: dict[Format, str] = {"webdataset": "tars", "parquet": "Parquet tables", "folder": "images"}
FORMATS: tuple[Format, ...] = tuple(FORMAT_NOUNS)
"""The formats that `--format` may name."""

FilesByFormat = dict[Format, list[str]]


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
    """What is made of the files of one input."""

    files: dict[Format, Files]
    """The files that are read, by format."""
    unread: Unread


def choose_files(
    found: FoundFiles, wanted: str, known: Collection[Shard] = (), patterns: Patterns = Patterns()
) -> Chosen:
    """Choose the files of an input that are read.

    Files that the user named one by one are all read. Of a folder or a glob the files of one format are
    read: the wanted one, or the only one there. img2dataset writes a table next to each tar (and next to
    each folder of images); these tables do not count. Files whose names have no ending are images if their
    first bytes say so.

    Args:
        found: the files of the input.
        wanted: a format, or "auto".
        known: the shards of an earlier listing. Their format decides for "auto" if it is one, and their files
            are not opened again.
        patterns: which files the user wants.

    Raises:
        InputError: there is no file of the wanted format, or there are files of several formats.
    """
    all_files = found.files
    found = replace(found, files={file: listed for file, listed in all_files.items() if patterns.take(file)})
    known_format = _only_format(known)
    root = without_secrets(found.root)
    known_files = {file for shard in known if without_secrets(shard.root) == root for file in shard.files}
    by_format, others = _sort_by_format(found, known_format if wanted == "auto" else wanted, known_files)
    own: list[str] = []
    if found.one_by_one:
        chosen = _choose_named_files(found, wanted, by_format, others)
    else:
        if wanted != "auto":
            by_format = {name: files for name, files in by_format.items() if name == wanted}
        elif known_format in by_format:
            by_format = {known_format: by_format[known_format]}
        elif len(by_format) > 1 and "parquet" in by_format:
            by_format["parquet"] = _without_metadata(by_format)
        own = _own_outputs(found.root, by_format.get("parquet", ()), known_files)
        chosen = {name: sorted(set(files).difference(own)) for name, files in by_format.items()}
        chosen = {name: files for name, files in chosen.items() if files}
        _refuse_several(found, chosen)
    rest = set(found.files).difference(own, *chosen.values())
    if not chosen:
        _refuse_nothing(found, wanted, rest, len(own))
    files = {name: {file: found.files[file] for file in files} for name, files in chosen.items()}
    return Chosen(files, Unread(_count_endings(rest), len(own), len(all_files) - len(found.files)))


def _only_format(shards: Iterable[Shard]) -> Format | None:
    formats = {shard.format for shard in shards}
    return formats.pop() if len(formats) == 1 else None


def _sort_by_format(
    found: FoundFiles, wanted: str | None, known: Collection[str]
) -> tuple[FilesByFormat, list[str]]:
    """Return the files of each format, and those of none; of the known ones none is opened."""
    by_format: FilesByFormat = {}
    others, unnamed = [], []
    for file in found.files:
        file_format = format_of(file) if found.one_by_one or not _belongs_to_a_tool(file) else None
        if file_format is not None:
            by_format.setdefault(file_format, []).append(file)
        elif wanted in (None, "folder") and not posixpath.splitext(file)[1]:
            if file in known:
                by_format.setdefault("folder", []).append(file)
            else:
                unnamed.append(file)
        else:
            others.append(file)
    if unnamed:
        filesystem, base = open_filesystem(found.root)
        with ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS) as threads:
            heads = threads.map(partial(_head, filesystem), [join(base, file) for file in unnamed])
            images = {file for file, head in zip(unnamed, heads, strict=True) if looks_like_image(head)}
        if images:
            by_format.setdefault("folder", []).extend(sorted(images))
        others += [file for file in unnamed if file not in images]
    return by_format, others


def _head(filesystem: pafs.FileSystem, path: str) -> bytes:
    """Return the first bytes of a file; none if it cannot be read."""
    try:
        with filesystem.open_input_stream(path, compression=None, buffer_size=None) as file:
            return file.read(HEAD_BYTES)
    except (OSError, UnicodeError, pa.ArrowException):
        return b""


def _own_outputs(root: str, tables: Sequence[str], known: Collection[str]) -> list[str]:
    """Return the tables that a run has written, as their footers say."""

    def is_own(table: str) -> bool:
        try:
            schema = parquet.schema_of(Shard(name=table, format="parquet", root=root, files=(table,)))
        except InputError:
            return False  # Reading the table says what is wrong.
        return FINGERPRINT_KEY in (schema.metadata or {})

    tables = [table for table in tables if table not in known]
    with ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS) as threads:
        return [table for table, own in zip(tables, threads.map(is_own, tables), strict=True) if own]


def format_of(file: str) -> Format | None:
    """Return the format of a file by the ending of its name, or None."""
    name = file.lower()
    return next((format for format, endings in FILE_ENDINGS.items() if name.endswith(endings)), None)


def _belongs_to_a_tool(file: str) -> bool:
    """Whether a file is another tool's own, as those in `_delta_log/` and `_temporary/` are.

    An image is not, because cameras call their files `_DSC0001.JPG`.
    """
    return (file.startswith("_") or "/_" in file) and format_of(file) != "folder"


def _choose_named_files(
    found: FoundFiles, wanted: str, by_format: FilesByFormat, others: list[str]
) -> FilesByFormat:
    """Choose among files that were named one by one: `--format` decides, whatever their names are."""
    given = next((format for format in FORMATS if format == wanted), None)
    if given is not None:
        return {given: list(found.files)}
    if others:
        raise InputError(
            f"the name {others[0]} does not tell whether the file is a tar, a Parquet table or an image; "
            "leave it out, or say what it is with --format"
        )
    return by_format


def _refuse_several(found: FoundFiles, by_format: FilesByFormat) -> None:
    if len(by_format) > 1:
        counts = " and ".join(
            f"{len(files)} {FORMAT_NOUNS[format]}" for format, files in sorted(by_format.items())
        )
        flags = " or ".join(f"--format {format}" for format in sorted(by_format))
        raise InputError(
            f"{found.name} must hold one kind of file, got {counts}; choose one with {flags}, "
            "or name each kind as an input of its own"
        )


def _refuse_nothing(found: FoundFiles, wanted: str, rest: Collection[str], num_own: int) -> None:
    nouns = " or ".join(FORMAT_NOUNS[name] for name in FORMATS if wanted in ("auto", name))
    if not (rest or num_own):
        raise InputError(f"{found.name} holds no file that --include and --exclude take; change the patterns")
    if num_own:
        raise InputError(
            f"{found.name} holds no {nouns} but the output of an earlier run ({num_own:,} files); name "
            "another input, or name these files one by one to read them"
        )
    raise InputError(
        f"{found.name} holds no {nouns}, only {_most_frequent(_count_endings(rest))}; "
        "name another input or --format"
    )


def _without_metadata(by_format: FilesByFormat) -> list[str]:
    """Return the tables that do not share their name with a tar or with a folder of images."""
    tars = {_without_ending(file) for file in by_format.get("webdataset", ())}
    folders = {posixpath.dirname(file) for file in by_format.get("folder", ())}
    return [file for file in by_format["parquet"] if _without_ending(file) not in tars | folders]


def _without_ending(file: str) -> str:
    for endings in FILE_ENDINGS.values():
        for ending in endings:
            if file.lower().endswith(ending):
                return file[: -len(ending)]
    return file


def _count_endings(files: Iterable[str]) -> dict[str, int]:
    return Counter(posixpath.splitext(file)[1].lower() or "without ending" for file in files)


def _most_frequent(endings: Mapping[str, int]) -> str:
    """Describe files by their five most frequent endings: `2 .json, 1 without ending`."""
    by_frequency = sorted(endings.items(), key=lambda entry: (-entry[1], entry[0]))
    named = [f"{count:,} {ending}" for ending, count in by_frequency[:5]]
    others = sum(count for _, count in by_frequency[5:])
    return ", ".join([*named, *([f"{others:,} others"] if others else [])])
