"""Which of an input's files are the input: tars, Parquet tables or images, without what lies beside them."""

from __future__ import annotations

import logging
import posixpath
from collections import Counter
from collections.abc import Iterable
from typing import get_args

from pipeline.inputs.find_files import Found, Sizes
from pipeline.inputs.reader import IMAGE_EXTENSIONS
from pipeline.inputs.shards import Format, InputError

ENDINGS: dict[Format, tuple[str, ...]] = {
    "webdataset": (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst"),
    "parquet": (".parquet", ".pq"),
    "folder": tuple(f".{extension}" for extension in IMAGE_EXTENSIONS),
}
"""What a file is, by the end of its name in any case."""
NOUNS: dict[Format, str] = {"webdataset": "tars", "parquet": "Parquet tables", "folder": "images"}
FORMATS: tuple[Format, ...] = get_args(Format)

FileKinds = dict[Format, list[str]]

log = logging.getLogger(__name__)


def choose_files(found: Found, format: str) -> dict[Format, Sizes]:
    """The files of an input that are to be read, by kind.

    Files that the user named one by one are all read. Of a folder or a glob only one kind is, the
    one that `format` says or the only one there; img2dataset's tables beside its tars (and beside
    its folders of images) do not count.

    Raises:
        InputError: there is no file of the kind, or more than one kind.
    """
    file_kinds: FileKinds = {}
    others = []
    for file in found.files:
        kind = _kind(file) if found.one_by_one or not _is_note(file) else None
        if kind is None:
            others.append(file)
        else:
            file_kinds.setdefault(kind, []).append(file)
    if found.one_by_one:
        chosen = _named(found, format, file_kinds, others)
    elif format == "auto":
        chosen = _only_kind(found, file_kinds)
    else:
        chosen = {kind: files for kind, files in file_kinds.items() if kind == format}
    if not chosen:
        wanted = " or ".join(NOUNS[kind] for kind in FORMATS if format in ("auto", kind))
        raise InputError(f"{found.name} must hold {wanted}, got only {_count(found.files)}")
    beside = set(found.files).difference(*chosen.values())
    if beside:
        log.info("%s: not read, beside the input: %s", found.name, _count(beside))
    return {kind: {file: found.files[file] for file in files} for kind, files in chosen.items()}


def _kind(file: str) -> Format | None:
    name = file.lower()
    return next((kind for kind, endings in ENDINGS.items() if name.endswith(endings)), None)


def _is_note(file: str) -> bool:
    """Whether it is another tool's own: `_delta_log/`, `_temporary/`; a camera's `_DSC0001.JPG` is not."""
    return (file.startswith("_") or "/_" in file) and _kind(file) != "folder"


def _named(found: Found, format: str, file_kinds: FileKinds, others: list[str]) -> FileKinds:
    """Files that were named are what `--format` says, whatever they are called."""
    wanted = next((kind for kind in FORMATS if kind == format), None)
    if wanted is not None:
        return {wanted: list(found.files)}
    if others:
        raise InputError(
            f"{others[0]} must be a tar, a Parquet table or an image by the end of its name; "
            "drop it, or say what it is with --format"
        )
    return file_kinds


def _only_kind(found: Found, file_kinds: FileKinds) -> FileKinds:
    if len(file_kinds) > 1 and "parquet" in file_kinds:
        tables = _without_metadata(file_kinds)
        file_kinds = {kind: tables if kind == "parquet" else files for kind, files in file_kinds.items()}
        file_kinds = {kind: files for kind, files in file_kinds.items() if files}
    if len(file_kinds) > 1:
        counts = " and ".join(f"{len(files)} {NOUNS[kind]}" for kind, files in sorted(file_kinds.items()))
        flags = " or ".join(f"--format {kind}" for kind in sorted(file_kinds))
        raise InputError(
            f"{found.name} must hold one kind of input, got {counts}; say which with {flags}, "
            "or name each kind as an input of its own"
        )
    return file_kinds


def _without_metadata(file_kinds: FileKinds) -> list[str]:
    """The tables that do not share their name with a tar, or with a folder of images."""
    tars = {_stem(file) for file in file_kinds.get("webdataset", ())}
    folders = {posixpath.dirname(file) for file in file_kinds.get("folder", ())}
    return [file for file in file_kinds["parquet"] if _stem(file) not in tars | folders]


def _stem(file: str) -> str:
    for endings in ENDINGS.values():
        for ending in endings:
            if file.lower().endswith(ending):
                return file[: -len(ending)]
    return file


def _count(files: Iterable[str]) -> str:
    endings = Counter(posixpath.splitext(file)[1] or "without ending" for file in files)
    most_first = sorted(endings.items(), key=lambda entry: (-entry[1], entry[0]))
    return ", ".join(f"{count} {ending}" for ending, count in most_first[:5])
