"""Choose which files of an input are read: tars, Parquet tables or images.

Folders often hold more than the input: tables of metadata next to tars, statistics, logs. So of a folder
or a glob one kind of file is read, and an input with two kinds is refused unless `--format` decides.
"""

from __future__ import annotations

import logging
import posixpath
from collections import Counter
from collections.abc import Iterable
from typing import get_args

from pipeline.errors import InputError
from pipeline.inputs.find_files import Files, FoundFiles
from pipeline.inputs.reader import IMAGE_EXTENSIONS
from pipeline.inputs.shards import Format

FILE_ENDINGS: dict[Format, tuple[str, ...]] = {
    "webdataset": (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst"),
    "parquet": (".parquet", ".pq"),
    "folder": tuple(f".{extension}" for extension in IMAGE_EXTENSIONS),
}
"""The endings of file names that tell the format of a file. Upper and lower case are the same."""
FORMAT_NOUNS: dict[Format, str] = {"webdataset": "tars", "parquet": "Parquet tables", "folder": "images"}
FORMATS: tuple[Format, ...] = get_args(Format)

FilesByFormat = dict[Format, list[str]]

log = logging.getLogger(__name__)


def choose_files(found: FoundFiles, wanted: str, known: Format | None = None) -> dict[Format, Files]:
    """Choose the files of an input that are read, by format.

    Files that the user named one by one are all read. Of a folder or a glob the files of one format are
    read: the wanted one, or the only one there. img2dataset writes a table next to each tar (and next to
    each folder of images); these tables do not count.

    Args:
        found: the files of the input.
        wanted: a format, or "auto".
        known: the format of an earlier listing, which decides for "auto" if there are several.

    Raises:
        InputError: there is no file of the wanted format, or there are files of several formats.
    """
    by_format: FilesByFormat = {}
    others = []
    for file in found.files:
        file_format = _format_of(file) if found.one_by_one or not _belongs_to_a_tool(file) else None
        if file_format is None:
            others.append(file)
        else:
            by_format.setdefault(file_format, []).append(file)
    if found.one_by_one:
        chosen = _choose_named_files(found, wanted, by_format, others)
    elif wanted == "auto":
        chosen = _choose_only_format(found, by_format, known)
    else:
        chosen = {name: files for name, files in by_format.items() if name == wanted}
    if not chosen:
        nouns = " or ".join(FORMAT_NOUNS[name] for name in FORMATS if wanted in ("auto", name))
        raise InputError(
            f"{found.name} holds no {nouns}, only {_count_endings(found.files)}; "
            "name another input or --format"
        )
    not_read = set(found.files).difference(*chosen.values())
    if not_read:
        log.info("%s: not read, next to the input: %s", found.name, _count_endings(not_read))
    return {name: {file: found.files[file] for file in files} for name, files in chosen.items()}


def _format_of(file: str) -> Format | None:
    name = file.lower()
    return next((format for format, endings in FILE_ENDINGS.items() if name.endswith(endings)), None)


def _belongs_to_a_tool(file: str) -> bool:
    """Whether a file is another tool's own, as those in `_delta_log/` and `_temporary/` are.

    An image is not, because cameras call their files `_DSC0001.JPG`.
    """
    return (file.startswith("_") or "/_" in file) and _format_of(file) != "folder"


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


def _choose_only_format(found: FoundFiles, by_format: FilesByFormat, known: Format | None) -> FilesByFormat:
    """Choose the only format of a folder or a glob, without tables that are metadata of other files."""
    if known is not None and known in by_format:
        return {known: by_format[known]}
    if len(by_format) > 1 and "parquet" in by_format:
        by_format = by_format | {"parquet": _without_metadata(by_format)}
        by_format = {format: files for format, files in by_format.items() if files}
    if len(by_format) > 1:
        counts = " and ".join(
            f"{len(files)} {FORMAT_NOUNS[format]}" for format, files in sorted(by_format.items())
        )
        flags = " or ".join(f"--format {format}" for format in sorted(by_format))
        raise InputError(
            f"{found.name} must hold one kind of file, got {counts}; choose one with {flags}, "
            "or name each kind as an input of its own"
        )
    return by_format


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


def _count_endings(files: Iterable[str]) -> str:
    """Describe files by their five most frequent endings: `2 .json, 1 without ending`."""
    endings = Counter(posixpath.splitext(file)[1] or "without ending" for file in files)
    by_frequency = sorted(endings.items(), key=lambda entry: (-entry[1], entry[0]))
    return ", ".join(f"{count} {ending}" for ending, count in by_frequency[:5])
