"""Export as WebDataset tars: each ok row is an image, its caption as `.txt`, and the whole row as `.json`.

The key of a sample is that of the row. WebDataset ends a key at the first dot of a base name, so other dots
become `_`, and a key that an earlier sample has gets the number of its row. The `.json` holds it as it was.
The images of one sample keep their names (`0.left.jpg` and `0.right.jpg`), and their texts are named likewise
(`0.left.txt`).
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Mapping
from typing import IO, Any

from pipeline.export.image_rows import ImageRows, extension_of
from pipeline.inputs.formats.seen_keys import SeenKeys
from pipeline.inputs.image_kinds import IMAGE_EXTENSIONS
from pipeline.report.rows import json_line

_UNSAFE = re.compile(r"\.(?=[^/]*$)")
_NOTE = re.compile(r"^__([^/]*)__")


def write_webdataset(file: IO[bytes], rows: ImageRows) -> int:
    """Write one shard as a tar."""
    num_rows = 0
    seen = SeenKeys()
    with tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for row, image in rows:
            key, part = sample_key(row), _part_of_sample(row)
            while f"{key}.{part.lower()}" in seen:  # WebDataset would take both for one sample.
                key = f"{key}_{row['row']}"
            seen.add(f"{key}.{part.lower()}")
            extension = extension_of(row.get("member") or row["key"], image)
            _add(tar, f"{key}.{part}{extension}", image)
            if row.get("caption") is not None:
                _add(tar, f"{key}.{part}txt", row["caption"].encode())
            _add(tar, f"{key}.{part}json", json_line(row).encode())
            num_rows += 1
    return num_rows


def sample_key(row: Mapping[str, Any]) -> str:
    """Return the key of a row as a path in a tar that WebDataset reads back as one key."""
    key = row["key"]
    stem, dot, ending = key.rpartition(".")
    if dot and row.get("member") is None and ending.lower() in IMAGE_EXTENSIONS:
        key = stem  # The key of a file is its path.
    parts = [part for part in key.replace("\0", "").split("/") if part not in ("", ".", "..")]
    path = _UNSAFE.sub("_", "/".join(parts))
    return _NOTE.sub(r"_\1_", path) or str(row["row"])


def _part_of_sample(row: Mapping[str, Any]) -> str:
    """Return what stands between key and ending in the name of an image's member, such as `left.`."""
    name = (row.get("member") or "").rpartition("/")[2]
    middle = name.partition(".")[2].rpartition(".")[0]
    return f"{middle}." if middle else ""


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
