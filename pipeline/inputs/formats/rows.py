"""Build tables from rows, for the formats whose rows are read one by one: tars and folders."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pyarrow as pa

from blip2_actor import Status
from pipeline.inputs.reader import ADDRESS, MEMBER, ReadOptions

_LIKE_AN_ESCAPE = re.compile(r"\\(?=x[0-9a-f]{2})")
TEXT_EXTENSIONS = ("txt", "text", "json", "caption", "cls", "url")
"""Extensions of members that are kept as strings (UTF-8, invalid bytes are replaced). Others stay bytes."""


class TableBuilder:
    """Collects rows until `is_full`; `take` returns them as a table and starts the next one."""

    def __init__(self, shard: str, options: ReadOptions) -> None:
        self._shard = shard
        self._options = options
        fields = options.columns | dict.fromkeys(options.texts, pa.string())
        for name, source in options.kept.items():
            fields[name] = member_type(source)
        self._schema = pa.schema(fields)
        self._rows: list[tuple[object, ...]] = []
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def holds_addresses(self) -> bool:
        """Whether the rows have addresses instead of images."""
        return ADDRESS in self._options.columns

    @property
    def is_full(self) -> bool:
        return len(self._rows) >= self._options.table_rows or self._num_bytes >= self._options.table_bytes

    def add(
        self,
        row: int,
        key: str,
        *,
        member: str | None = None,
        image: bytes | None = None,
        status: Status | None = None,
        error: str | None = None,
        address: str | None = None,
        members: Mapping[str, bytes],
    ) -> None:
        """Add a row.

        Args:
            row: number of the row in its shard.
            key: key of the row.
            member: name of the image's member in a tar.
            image: encoded image, or None.
            status: why there is no image, or None.
            error: one sentence if `status` is not None; it may hold names that are not UTF-8, like `key`.
            address: where the image is, if it is not in the shard.
            members: content of the other members that the row has, by extension in lower case.
        """
        escape = escape_name if self._options.schema_version > 1 else _escape_v1
        values: list[object] = [escape(key), self._shard, row, image, status, error and escape(error)]
        if MEMBER in self._options.columns:
            values.append(None if member is None else escape(member))
        if self.holds_addresses:
            values.append(address)
        for source in self._options.texts.values():
            text = members.get(source.lower())
            values.append(None if text is None else text.decode(errors="replace").rstrip("\r\n"))
        for source in self._options.kept.values():
            content = members.get(source.lower())
            is_text = content is not None and member_type(source) == pa.string()
            values.append(content.decode(errors="replace") if content is not None and is_text else content)
        self._rows.append(tuple(values))
        self._num_bytes += len(image or b"") + sum(map(len, members.values()))

    def take(self) -> pa.Table:
        columns = list(zip(*self._rows, strict=True)) or [()] * len(self._schema)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        self._rows, self._num_bytes = [], 0
        return pa.Table.from_arrays(arrays, schema=self._schema)


def member_type(extension: str) -> pa.DataType:
    """Return the type of the column that a kept member becomes."""
    return pa.string() if extension.lower().rpartition(".")[2] in TEXT_EXTENSIONS else pa.binary()


def escape_name(name: str) -> str:
    """Write bytes that are not UTF-8 as `\\xff`: a file name may hold them, an Arrow string may not.

    A backslash that would read as such an escape becomes `\\x5c`, so that no two names become the same.
    """
    if "\\x" in name:
        name = _LIKE_AN_ESCAPE.sub(r"\\x5c", name)
    return _escape_v1(name)


def _escape_v1(name: str) -> str:
    return name if name.isascii() else name.encode(errors="surrogateescape").decode(errors="backslashreplace")
