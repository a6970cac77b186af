"""What `--input @FILE` names: the images of a manifest, or the tars and tables that its lines name."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import cast

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.inputs.find_files import FoundFiles, find_files, find_named
from pipeline.inputs.formats.addresses import folder_of, resolve
from pipeline.inputs.formats.endings import format_of
from pipeline.inputs.formats.manifests.records import kind_of, records
from pipeline.storage.retrying_file import open_below
from pipeline.storage.secrets import without_secrets

MARK = "@"
"""Prefix of an input that is a manifest."""


def find_input(name: str, may_lack: bool) -> Iterator[tuple[FoundFiles, bool]]:
    """Find the files that one input means.

    Args:
        name: the input.
        may_lack: as for `find_files`.

    Yields:
        Files, and whether they are a manifest of images: one file whose records are the rows.

    Raises:
        InputError: as `find_files` does, or the manifest cannot be read.
    """
    if not name.startswith(MARK):
        yield find_files(name, may_lack), False
        return
    found = find_files(name.removeprefix(MARK), may_lack)
    if may_lack and not found.files:
        yield found, True
        return
    if not found.one_by_one or len(found.files) != 1:
        raise InputError(f"{name} must name one file, a manifest; leave out the {MARK} to read a folder")
    lines = _lines_with_shards(found)
    if lines is None:
        yield found, True
    else:
        yield from ((named, False) for named in _named_by(found, lines, may_lack))


def _lines_with_shards(found: FoundFiles) -> list[str] | None:
    """Return the lines of a manifest of tars or tables, or None if it is one of images."""
    (file,) = found.files
    kind = kind_of(file)
    if kind != "lines":
        return None
    lines: list[str] = []
    try:
        with open_below(found.root, file) as source:
            for _, record in records(io.BufferedReader(cast(io.RawIOBase, source)), kind):
                line = record.decode().strip()
                if format_of(line.partition("?")[0]) not in ("webdataset", "parquet"):
                    if not lines:
                        return None
                    raise InputError(
                        f"the lines of {found.name} must all name images, or all tars and tables, got "
                        f"{without_secrets(line)} after {without_secrets(lines[-1])}; divide it in two"
                    )
                lines.append(line)
    except (OSError, UnicodeError, pa.ArrowException) as error:
        raise InputError(f"{found.name} cannot be read: {error}; check the file") from error
    return lines or None


def _named_by(found: FoundFiles, lines: Sequence[str], may_lack: bool) -> list[FoundFiles]:
    """Return the files that lines name, by their folders."""
    (file,) = found.files
    folder = folder_of(found.root, file)
    by_folder: dict[str, list[str]] = {}
    for line in lines:
        if "?" in line and "://" in line:
            raise InputError(
                f"{found.name} must name files without passwords or options, which a run cannot store, got "
                f"{without_secrets(line)}?…; give this URI as an --input of its own"
            )
        place, mark, options = resolve(line, folder).partition("?")
        parent, _, name = place.rpartition("/")
        by_folder.setdefault(parent + mark + options, []).append(name)
    return [find_named(found.name, root, names, may_lack) for root, names in by_folder.items()]
