"""Read folders of image files: one file is one row, and its key is its path.

A file that cannot be read costs its own row only. The rows follow the list of files that the shard holds,
and the folder is not listed again. So the same work gives the same tables, also when files were added.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pyarrow as pa
import pyarrow.fs as pafs

from blip2_actor import Status
from pipeline.errors import InputError
from pipeline.inputs.formats.rows import TableBuilder, escape_name, member_types
from pipeline.inputs.reader import ReadOptions, ShardReport, ShardWork, Tables
from pipeline.storage.filesystems import MAX_CONCURRENT_REQUESTS, join, open_filesystem
from pipeline.storage.retrying_file import read_whole

Content = tuple[bytes | None, Status | None, str | None]
"""An image, or the status and the error that say why there is none."""


def read(work: ShardWork, options: ReadOptions) -> Tables:
    """Yield the files asked for. A file that cannot be read becomes a row with a status and an error."""
    shard, version = work.shard, options.schema_version
    table = TableBuilder(shard.name, options, member_types(options))
    try:
        filesystem, root = open_filesystem(shard.root)
    except InputError as error:
        return ShardReport(shard=shard.name, num_rows=0, complete=False, reason=str(error))

    def read_row(row: int) -> Content:
        return read_file(filesystem, join(root, shard.files[row]), options.max_image_bytes)

    num_rows = shard.limit_rows(len(shard.files))
    rows = (row for span in work.overlaps(0, num_rows) for row in range(*span))
    with ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS) as threads:
        while batch := list(islice(rows, MAX_CONCURRENT_REQUESTS)):
            for row, (image, status, reason) in zip(batch, threads.map(read_row, batch), strict=True):
                values = {"key": escape_name(shard.files[row], version), "image": image, "status": status}
                table.add(row, values | {"error": reason and escape_name(reason, version)})
                if table.is_full:
                    yield table.take()
    if len(table):
        yield table.take()
    return ShardReport(shard=shard.name, num_rows=num_rows, complete=True)


def read_file(filesystem: pafs.FileSystem, path: str, max_bytes: int) -> Content:
    """Read an image file, or say why it cannot be read."""
    try:
        num_bytes, content = read_whole(filesystem, path, max_bytes)
    except (OSError, UnicodeError, pa.ArrowException) as error:
        return None, Status.UNREADABLE, f"the file cannot be read: {error}"
    if num_bytes > max_bytes:
        return None, Status.TOO_LARGE, f"the file has {num_bytes} bytes, more than {max_bytes}"
    if not content:
        return None, Status.MISSING_IMAGE, "the file is empty"
    return content, None, None
