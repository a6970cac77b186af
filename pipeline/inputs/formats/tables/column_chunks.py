"""What the footer of a Parquet file says of the columns in a row group.

`RowGroupMetaData.column` ends the process if that is damaged: pyarrow does not catch the exception of C++
there, as it does where columns are read. So they are first read from a file without bytes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, NoReturn

import pyarrow.parquet as pq

_FILE_BYTES = 1 << 62


class _BytesWanted(Exception):
    """All columns were found in the footer, and the first of them would be read now."""


class _WithoutBytes(io.RawIOBase):
    """A large file that raises `_BytesWanted` when it is read."""

    _position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        self._position = _FILE_BYTES if whence == io.SEEK_END else position
        return self._position

    def readinto(self, buffer: Any) -> NoReturn:
        raise _BytesWanted


def column_chunks(
    metadata: pq.FileMetaData, group: int, names: Sequence[str]
) -> dict[int, pq.ColumnChunkMetaData]:
    """Return what the footer says of columns in a row group, by their numbers in the file's schema.

    Args:
        names: of columns of the table. One of a struct or of a list is several columns of the file, and names
            may have dots.

    Raises:
        OSError: the footer is damaged there.
    """
    schema, chunks = metadata.schema, metadata.row_group(group)
    paths = [schema.column(index).path for index in range(metadata.num_columns)]
    wanted = [
        index
        for index, path in enumerate(paths)
        if any(path == name or path.startswith(f"{name}.") for name in names)
    ]
    if not (wanted and chunks.num_rows):
        return {}
    try:
        with pq.ParquetFile(_WithoutBytes(), metadata=metadata, buffer_size=4096, pre_buffer=False) as file:
            next(file.iter_batches(1, [group], names, use_threads=False), None)
    except _BytesWanted:
        return {index: chunks.column(index) for index in wanted}
    raise OSError("the file has rows, but no columns")
