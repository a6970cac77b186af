"""The records of a manifest: lines of text, of CSV or of JSON, each with its place in the file.

Blank lines are no records. A record of CSV may have line breaks in a quoted field. A quote begins one only at
the start of a field, as for `csv.reader`; elsewhere it is a character like others.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
from collections.abc import Iterator
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
MAX_NUMBER_DIGITS = 4300
"""Maximum digits of an integer in JSON; Python refuses longer ones, with a hint that does not help here."""
_DIALECTS: dict[Kind, str] = {"csv": "excel", "tsv": "excel-tab"}
_QUOTED: dict[Kind, re.Pattern[bytes]] = {
    "csv": re.compile(rb'(?:^|[,\r\n])"[^"]*+(?:""[^"]*+)*+("?)'),
    "tsv": re.compile(rb'(?:^|[\t\r\n])"[^"]*+(?:""[^"]*+)*+("?)'),
}
"""A quoted field from the character before it on, and the quote that ends it."""
_MARK = b"\xef\xbb\xbf"
"""Some programs begin a file in UTF-8 with it."""

csv.field_size_limit(MAX_RECORD_BYTES)  # Python's own limit of 128 KiB is less than many images as data URIs.


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
        in_quotes = _ends_in_quotes(line, kind, in_quotes)
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


def _ends_in_quotes(text: bytes, kind: Kind, starts_in_quotes: bool = False) -> bool:
    """Return whether a text of whole lines ends within a quoted field."""
    if kind not in _QUOTED or b'"' not in text:
        return starts_in_quotes
    last_quote = b'"'
    for field in _QUOTED[kind].finditer(b'"' + text if starts_in_quotes else text):
        last_quote = field[1]
    return not last_quote


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
            columns = _fields(record, kind)
            if kind == "csv" and len(columns) == 1 and ";" in columns[0]:
                raise ValueError("it has semicolons; a CSV must have commas between its columns")
            return columns, end
        header = list(_from_json(record))
        "".join(header).encode()  # JSON may have half of a surrogate pair, which is no text.
        return header, 0
    except ValueError as error:
        raise InputError(f"the first line of the manifest cannot be read: {error}") from None


def values(record: bytes, kind: Kind, columns: list[str]) -> dict[str, str | None]:
    """Return the values of a record by column; what is no text in JSON is written as JSON.

    Raises:
        ValueError: the record cannot be read.
    """
    if kind == "lines":
        return {LINE_COLUMN: _decoded(record).strip("\r\n")}
    if kind == "json":
        found = _from_json(record)
        return {name: found.get(name) for name in columns}
    fields = _fields(record, kind)
    if len(fields) != len(columns):
        raise ValueError(f"it has {len(fields)} fields, and the header {len(columns)}")
    return dict(zip(columns, fields, strict=True))


def _decoded(record: bytes) -> str:
    try:
        return record.decode()
    except UnicodeDecodeError as error:
        byte = record[error.start]
        raise ValueError(
            f"it is not UTF-8, byte {byte:#04x} at {error.start}; save the file as UTF-8"
        ) from None


def _fields(record: bytes, kind: Kind) -> list[str]:
    if _ends_in_quotes(record, kind):
        raise ValueError("a quote does not end, so that all lines after it would be part of the record")
    try:
        lines = io.StringIO(_decoded(record), newline="")
        rows = [fields for fields in csv.reader(lines, _DIALECTS[kind]) if fields]
    except csv.Error as error:
        raise ValueError(str(error)) from None
    if len(rows) > 1:
        raise ValueError("it has carriage returns outside quotes; end lines with a line feed")
    return rows[0]


def _from_json(record: bytes) -> dict[str, str | None]:
    try:
        found = json.loads(record, parse_int=_integer)
        if isinstance(found, dict):
            return {name: _text(value) for name, value in found.items()}
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    raise ValueError(f"it must be a JSON object, got {type(found).__name__}")


def _integer(digits: str) -> int:
    num_digits = len(digits.lstrip("-"))
    if num_digits > MAX_NUMBER_DIGITS:
        raise ValueError(f"it has a number of {num_digits:,} digits; write it as a text, in quotes")
    return int(digits)


def _text(value: object) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
