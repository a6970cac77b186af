"""Build tables from rows, for the formats whose rows are read one by one: tars, folders and manifests."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pyarrow as pa

from pipeline.column_names import SCHEMA_VERSION
from pipeline.inputs.reader import ReadOptions

_LIKE_AN_ESCAPE = re.compile(r"\\(?=x[0-9a-f]{2})")
TEXT_EXTENSIONS = ("txt", "text", "json", "caption", "cls", "url")
"""Extensions of members that are kept as strings (UTF-8, invalid bytes are replaced). Others stay bytes."""


class TableBuilder:
    """Collects rows until `is_full`; `take` returns them as a table and starts the next one.

    Args:
        shard: name of the shard.
        options: the first columns, and the limits of a table.
        others: the columns that follow, with their types.
    """

    def __init__(self, shard: str, options: ReadOptions, others: dict[str, pa.DataType]) -> None:
        self._shard = shard
        self._options = options
        self._schema = pa.schema(options.columns | others)
        self._rows: list[dict[str, object]] = []
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def is_full(self) -> bool:
        return len(self._rows) >= self._options.table_rows or self._num_bytes >= self._options.table_bytes

    def add(self, row: int, values: Mapping[str, object]) -> None:
        """Add a row by its number in the shard; columns without a value are null."""
        self._rows.append({"shard": self._shard, "row": row, **values})
        self._num_bytes += sum(len(value) for value in values.values() if isinstance(value, (bytes, str)))

    def take(self) -> pa.Table:
        table = pa.Table.from_pylist(self._rows, self._schema)
        self._rows, self._num_bytes = [], 0
        return table


def member_types(options: ReadOptions) -> dict[str, pa.DataType]:
    """Return the columns that the members of a sample become, with their types."""
    kept = {name: member_type(extension) for name, extension in options.kept.items()}
    return dict.fromkeys(options.texts, pa.string()) | kept


def member_values(members: Mapping[str, bytes], options: ReadOptions) -> dict[str, object]:
    """Return the columns that members become, which are given by extension in lower case."""
    values: dict[str, object] = {}
    for name, extension in options.texts.items():
        if (text := members.get(extension.lower())) is not None:
            values[name] = text.decode(errors="replace").rstrip("\r\n")
    for name, extension in options.kept.items():
        if (content := members.get(extension.lower())) is not None:
            is_text = member_type(extension) == pa.string()
            values[name] = content.decode(errors="replace") if is_text else content
    return values


def member_type(extension: str) -> pa.DataType:
    """Return the type of the column that a kept member becomes."""
    return pa.string() if extension.lower().rpartition(".")[2] in TEXT_EXTENSIONS else pa.binary()


def escape_name(name: str, schema_version: int = SCHEMA_VERSION) -> str:
    """Write bytes that are not UTF-8 as `\\xff`: a file name may hold them, an Arrow string may not.

    A backslash that would read as such an escape becomes `\\x5c`, so that no two names become the same; in
    version 1 of the row contract it stays.
    """
    if "\\x" in name and schema_version > 1:
        name = _LIKE_AN_ESCAPE.sub(r"\\x5c", name)
    return name if name.isascii() else name.encode(errors="surrogateescape").decode(errors="backslashreplace")
