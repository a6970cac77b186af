"""The records of a manifest: lines of text, of CSV or of JSON, each with its place in the file.

Blank lines are no records. A record of CSV may have line breaks between quotes.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterator, Mapping
from typing import IO, Literal

from pipeline.errors import InputError

Kind = Literal["lines", "csv", "tsv", "json"]
KINDS: dict[str, Kind] = {
    "": "lines",
    ".txt": "lines",
    ".lst": "lines",
    ".list": "lines",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "json",
    ".ndjson": "json",
}
"""The kind of a manifest by the ending of its name."""
LINE_COLUMN = "path"
"""The only column of a manifest of plain lines."""
MAX_RECORD_BYTES = 64 << 20
_MARK = b"\xef\xbb\xbf"
"""Some programs begin a file in UTF-8 with it."""


def kind_of(file: str) -> Kind:
    """Return the kind of a manifest.

    Raises:
        InputError: the ending of its name is unknown.
    """
    kind = KINDS.get(posixpath.splitext(file)[1].lower())
    if kind is None:
        raise InputError(
            f"a manifest must be lines of text (.txt), CSV (.csv, .tsv) or JSON lines (.jsonl), got {file}; "
            "write it as one of these, or name tars and tables without @"
        )
    return kind


def records(file: IO[bytes], kind: Kind, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield the records from a position of a file on: where each ends, and its content.

    Raises:
        InputError: a record has more than `MAX_RECORD_BYTES` bytes.
    """
    file.seek(start)
    position, num_bytes, in_quotes = start, 0, False
    lines: list[bytes] = []
    while line := file.readline(MAX_RECORD_BYTES):
        if position == 0:
            line, position = line.removeprefix(_MARK), len(line) - len(line.removeprefix(_MARK))
        position += len(line)
        num_bytes += len(line)
        lines.append(line)
        if num_bytes >= MAX_RECORD_BYTES:
            raise InputError(f"the record before byte {position} is too long, or a quote does not end")
        if kind in ("csv", "tsv") and line.count(b'"') % 2:
            in_quotes = not in_quotes
        if in_quotes:
            continue
        record = b"".join(lines)
        if record.strip():
            yield position, record
        num_bytes = 0
        lines.clear()
    record = b"".join(lines)
    if record.strip():
        yield position, record


def names(file: IO[bytes], kind: Kind) -> tuple[list[str], int]:
    """Return the names of the columns, and the position of the first record.

    The columns of JSON lines are the names in the first line.

    Raises:
        InputError: the file is empty, or its first line cannot be read.
    """
    if kind == "lines":
        return [LINE_COLUMN], 0
    first = next(records(file, kind), None)
    if first is None:
        raise InputError("the manifest is empty")
    end, record = first
    try:
        if kind != "json":
            return _fields(record.decode(), kind), end
        return list(_object(record)), 0
    except ValueError as error:
        raise InputError(f"the first line of the manifest cannot be read: {error}") from None


def values(record: bytes, kind: Kind, columns: list[str]) -> dict[str, str | None]:
    """Return the values of a record by column; what is no text in JSON is written as JSON.

    Raises:
        ValueError: the record cannot be read.
    """
    if kind == "lines":
        return {LINE_COLUMN: record.decode().strip("\r\n")}
    if kind == "json":
        found = _object(record)
        return {name: _text(found.get(name)) for name in columns}
    fields = _fields(record.decode(), kind)
    if len(fields) != len(columns):
        raise ValueError(f"it has {len(fields)} fields, and the header {len(columns)}")
    return dict(zip(columns, fields, strict=True))


def _fields(text: str, kind: Kind) -> list[str]:
    try:
        (fields,) = csv.reader(
            io.StringIO(text, newline=""), dialect="excel-tab" if kind == "tsv" else "excel"
        )
    except csv.Error as error:
        raise ValueError(str(error)) from None
    return fields


def _object(record: bytes) -> Mapping[str, object]:
    found = json.loads(record)
    if not isinstance(found, dict):
        raise ValueError(f"it must be a JSON object, got {type(found).__name__}")
    return found


def _text(value: object) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
