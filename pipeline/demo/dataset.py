"""The demonstration's data set: drawn scenes in WebDataset tars and a Parquet file, some broken on purpose.

The scenes are from the `held_out` split, on which the demonstration checkpoint was not trained. The expected
result of every row is returned, and written to `truth.json` next to the shards.
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from blip2_actor import Status
from blip2_actor.demo import SceneSampler, draw

INPUTS = TARS, TABLE = "shards", "table"
"""Folders with inputs of one kind and nothing else, so that each can be captioned or planned by itself."""
MARKER = ".blip2-demo"
"""A file in a folder that an earlier demo has written, and that the next one may delete."""
TRUTH_FILE = "truth.json"
SIDES_PX = (64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
ODD_FRACTION = 0.02
"""Fraction of rows that are broken, or look broken but can be read."""
_DRAWN_AT_ONCE = 32


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The expected result of a row."""

    status: Status
    caption: str | None
    """The only correct caption of the scene; None unless the status is ok."""
    note: str = ""
    """What is odd about the row; empty for an ordinary image."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    key: str
    caption: str
    image: bytes | None
    extension: str
    expected: Expected


def write_demo_dataset(
    folder: Path, *, num_images: int = 3000, num_tars: int = 4, seed: int = 0
) -> dict[str, Expected]:
    """Write `num_tars` tars to `folder/shards` and one Parquet file to `folder/table`, of about equal size.

    Args:
        folder: created if it is missing; files of the same names are replaced.
        num_images: number of rows, including the broken ones.
        num_tars: number of tars.
        seed: equal seeds give equal bytes.

    Returns:
        The expected result of each row by its key, in the order of the shards' names and their rows.
    """
    for name in INPUTS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows = list(_rows(num_images, seed))
    parts = [
        rows[len(rows) * i // (num_tars + 1) : len(rows) * (i + 1) // (num_tars + 1)]
        for i in range(num_tars + 1)
    ]
    for index, part in enumerate(parts[:-1]):
        _write_tar(folder / TARS / f"scenes-{index:05d}.tar", part)
    _write_parquet(folder / TABLE / "scenes.parquet", parts[-1])
    truth = {row.key: row.expected for row in rows}
    (folder / TRUTH_FILE).write_text(json.dumps({k: asdict(e) for k, e in truth.items()}, indent=0) + "\n")
    return truth


def _rows(num_images: int, seed: int) -> Iterator[_Row]:
    rng = np.random.default_rng(seed)
    sampler = SceneSampler("held_out", seed)
    # Every kind of odd row occurs, in a small data set too.
    num_odd = min(num_images, max(len(_ODDITIES), round(num_images * ODD_FRACTION)))
    odd_rows = np.sort(rng.choice(num_images, num_odd, replace=False))
    odd = {int(row): i % len(_ODDITIES) for i, row in enumerate(odd_rows)}
    for start in range(0, num_images, _DRAWN_AT_ONCE):
        scenes = sampler.sample(min(_DRAWN_AT_ONCE, num_images - start))
        for row, (caption, pixels) in enumerate(
            zip(scenes.captions, draw(scenes, int(rng.choice(SIDES_PX))), strict=True), start
        ):
            plain = _plain(f"scene-{row:06d}", str(caption), Image.fromarray(pixels), rng)
            yield _ODDITIES[odd[row]](plain) if row in odd else plain


def _plain(key: str, caption: str, picture: Image.Image, rng: np.random.Generator) -> _Row:
    file = io.BytesIO()
    extension = str(rng.choice(["jpg", "jpeg", "png"], p=[0.6, 0.1, 0.3]))
    if extension == "png":
        picture.save(file, "PNG", compress_level=1)
    else:
        picture.save(file, "JPEG", quality=int(rng.integers(75, 96)))
    expected = Expected(status=Status.OK, caption=caption)
    return _Row(key=key, caption=caption, image=file.getvalue(), extension=extension, expected=expected)


def _broken(row: _Row, image: bytes | None, status: Status, note: str, extension: str | None = None) -> _Row:
    expected = Expected(status=status, caption=None, note=note)
    return replace(row, image=image, extension=extension or row.extension, expected=expected)


def _cut(row: _Row) -> _Row:
    assert row.image is not None
    return _broken(row, row.image[: len(row.image) // 2], Status.UNDECODABLE, "cut in the middle")


def _garbage(row: _Row) -> _Row:
    noise = np.random.default_rng(zlib.crc32(row.key.encode())).bytes(2000)
    return _broken(row, noise, Status.UNDECODABLE, "bytes that are no image")


def _empty(row: _Row) -> _Row:
    return _broken(row, b"", Status.MISSING_IMAGE, "an empty file")


def _absent(row: _Row) -> _Row:
    return _broken(row, None, Status.MISSING_IMAGE, "no image at all")


def _huge(row: _Row) -> _Row:
    return _broken(row, _png_header(50_000, 50_000), Status.TOO_LARGE, "2.5 gigapixels in 100 bytes", "png")


def _misnamed(row: _Row) -> _Row:
    extension = "jpg" if row.extension == "png" else "png"
    expected = replace(row.expected, note="an extension that lies; readable")
    return replace(row, extension=extension, expected=expected)


_ODDITIES: tuple[Callable[[_Row], _Row], ...] = (_cut, _garbage, _empty, _absent, _huge, _misnamed)


def _png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and has almost no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def _write_tar(path: Path, rows: list[_Row]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            members = {"txt": row.caption.encode(), "json": json.dumps({"caption": row.caption}).encode()}
            if row.image is not None:
                members = {row.extension: row.image, **members}
            for extension, content in members.items():
                member = tarfile.TarInfo(f"{row.key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _write_parquet(path: Path, rows: list[_Row]) -> None:
    table = pa.table(
        {
            "key": pa.array([row.key for row in rows], pa.string()),
            "image": pa.array([row.image for row in rows], pa.binary()),
            "caption": pa.array([row.caption for row in rows], pa.string()),
        }
    )
    pq.write_table(table, path, row_group_size=200)
