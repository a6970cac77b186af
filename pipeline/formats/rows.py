"""Rows to tables, for the formats whose rows are read one by one."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from blip2_actor import Status
from pipeline.inputs.reader import READ_COLUMNS, ReadOptions

TEXT_EXTENSIONS = ("txt", "text", "json", "caption", "cls", "url")
"""Members that are kept as strings (UTF-8, with damage in it marked); the others stay bytes."""


class TableBuilder:
    """Collects rows until `full`; `take()` gives them as a table."""

    def __init__(self, shard: str, options: ReadOptions) -> None:
        self._shard = shard
        self._options = options
        fields = READ_COLUMNS | dict.fromkeys(options.texts, pa.string())
        for name, source in options.kept.items():
            fields[name] = member_type(source)
        self._schema = pa.schema(fields)
        self._rows: list[tuple[object, ...]] = []
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def full(self) -> bool:
        return len(self._rows) >= self._options.table_rows or self._num_bytes >= self._options.table_bytes

    def add(
        self,
        row: int,
        key: str,
        *,
        image: bytes | None = None,
        status: Status | None = None,
        error: str | None = None,
        members: Mapping[str, bytes],
    ) -> None:
        """Add a row: its image or the status that says why there is none, and the other members it has."""
        values: list[object] = [_printable(key), self._shard, row, image, status, error]
        for source in self._options.texts.values():
            text = members.get(source.lower())
            values.append(None if text is None else text.decode(errors="replace").rstrip("\r\n"))
        for source in self._options.kept.values():
            content = members.get(source.lower())
            as_text = content is not None and member_type(source) == pa.string()
            values.append(content.decode(errors="replace") if content is not None and as_text else content)
        self._rows.append(tuple(values))
        self._num_bytes += len(image or b"") + sum(map(len, members.values()))

    def take(self) -> pa.Table:
        columns = list(zip(*self._rows, strict=True)) or [()] * len(self._schema)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        self._rows, self._num_bytes = [], 0
        return pa.Table.from_arrays(arrays, schema=self._schema)


def member_type(extension: str) -> pa.DataType:
    """The type of the column that a kept member becomes."""
    return pa.string() if extension.lower().rpartition(".")[2] in TEXT_EXTENSIONS else pa.binary()


def _printable(name: str) -> str:
    """File names may hold bytes that are no UTF-8, which no Arrow string can."""
    return name if name.isascii() else name.encode(errors="surrogateescape").decode(errors="backslashreplace")
