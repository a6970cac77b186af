"""The endings of file names that tell the format of a file. Upper and lower case are the same."""

from __future__ import annotations

from pipeline.inputs.image_kinds import IMAGE_EXTENSIONS
from pipeline.inputs.shards import Format

COMPRESSIONS = ("gz", "bz2", "xz", "zst")
"""Follow the ending of a tar."""
FORMATS_BY_ENDING: dict[str, Format] = {
    **dict.fromkeys(("tar", "tgz", "tbz2", "txz", "tzst", *(f"tar.{c}" for c in COMPRESSIONS)), "webdataset"),
    **dict.fromkeys(("parquet", "pq"), "parquet"),
    **dict.fromkeys(IMAGE_EXTENSIONS, "folder"),
}


def format_of(file: str) -> Format | None:
    """Return the format of a file by the ending of its name, or None."""
    return FORMATS_BY_ENDING.get(_ending(file))


def without_ending(file: str) -> str:
    """Return the name of a file without the ending that tells its format."""
    ending = _ending(file)
    return file[: -len(ending) - 1] if ending in FORMATS_BY_ENDING else file


def _ending(file: str) -> str:
    """Return what follows the last dot of a name, or the dot before a compression; "" without a dot."""
    stem, dot, ending = file.lower().rpartition(".")
    if ending in COMPRESSIONS:
        stem, dot, before = stem.rpartition(".")
        ending = f"{before}.{ending}"
    return ending if dot else ""
