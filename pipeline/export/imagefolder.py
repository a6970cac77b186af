"""Export as an image folder of the `datasets` library: images, and one `metadata.jsonl` that names them.

The metadata is written last, from the parts of all shards. `datasets` takes the types of its columns from the
values, so columns that are null or empty in every ok row are left out. It opens the files that a column named
`file_name` or `*_file_name` names, and adds a column `image`: kept columns of these names get a `_` appended.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.export.destination import Destination
from pipeline.export.image_rows import ImageRows, extension_of
from pipeline.report.rows import json_line

METADATA = "metadata.jsonl"
PART = ".rows.jsonl"
"""Hidden, because `datasets` would take a second metadata file for one more split."""
_FILES = re.compile(r"^image$|(^|_)file_names?$")
LEFT_OUT = ("status", "error", "flags", "captions", "logprobs", "member")


def write_imagefolder(folder: Path, name: str, rows: ImageRows) -> int:
    """Write the images of one shard, named by their rows, and a line for each.

    Args:
        folder: where to write.
        name: the folder's later name below the folder of the export.
    """
    num_rows = 0
    with (folder / PART).open("w", encoding="utf-8") as part:
        for row, image in rows:
            file_name = f"{row['row']:06d}.{extension_of(row.get('member') or row['key'], image)}"
            (folder / file_name).write_bytes(image)
            kept = _renamed({column: value for column, value in row.items() if column not in LEFT_OUT})
            part.write(json_line({"file_name": f"{name}/{file_name}", **kept}) + "\n")
            num_rows += 1
        part.flush()
        os.fsync(part.fileno())
    return num_rows


def _renamed(value: Any) -> Any:
    """Return a value whose names, on every level, name no file for `datasets`."""
    if isinstance(value, Mapping):
        return {f"{name}_" if _FILES.search(name) else name: _renamed(item) for name, item in value.items()}
    if isinstance(value, tuple):  # An entry of a map; `datasets` refuses lists of values of several types.
        return {"key": _renamed(value[0]), "value": _renamed(value[1])}
    return [_renamed(item) for item in value] if isinstance(value, list) else value


def finish_imagefolder(destination: Destination, shards: Iterable[str]) -> None:
    """Write the metadata of all shards."""
    with destination.file(METADATA) as file:
        for shard in shards:
            with (destination.root / destination.name_of(shard) / PART).open("rb") as part:
                shutil.copyfileobj(part, file)
