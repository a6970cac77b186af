"""The decode stage: a column of images becomes a column of uint8 pixels at the model's size.

Encoded bytes end here. The next stage gets pixels (null if the row has failed) and the status of each row.
Neither float images nor Python objects ever cross the object store.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL.Image import Image

from blip2_actor import DecodedImage, DecodePool, ImageLimits, Status, resize_image, upright_size
from pipeline.errors import noted
from pipeline.fetching.fetch_settings import FetchSettings
from pipeline.fetching.image_loader import ImageLoader
from pipeline.inputs.reader import ADDRESS
from pipeline.stages.image_column import Address, Cell, digest_of, read_images
from pipeline.stages.worker_exit import exit_without_destructors
from pipeline.stages.worker_log import tell_origins, worker_name

PIXELS = "_blip2_pixels"
"""Column with uint8[S, S, 3] as bytes; exists only between the decode and the caption stage."""
TRUNCATED = "_blip2_truncated"
"""Boolean column next to the pixels, if truncated images are accepted: whether the image is truncated."""
TRUNCATED_FLAG = "truncated"
"""A flag of rows whose image lacks its end."""
DECODED = ("status", "error", "width", "height", "sha256")
"""Columns that this stage adds to each row, besides the pixels."""
BATCH_ROWS = 128
"""Rows that are given to the decoding process at once."""
LOADED_BYTES = 16 << 20
"""Loaded images that are decoded as soon as they have this many bytes."""


class DecodeStage:
    """Decodes in a child process with limits. An actor of a Ray Data pool holds it."""

    def __init__(
        self,
        size_px: int,
        limits: ImageLimits,
        image_column: str,
        keeps_image: bool = False,
        fetch: FetchSettings | None = None,
        coordinator: Any = None,
    ) -> None:
        """Start the decoding process.

        Args:
            size_px: image size of the model.
            limits: what decoding one image may cost.
            image_column: column of images; see `pipeline.stages.image_column`.
            keeps_image: whether that column stays in the table.
            fetch: how images at web addresses are fetched; None refuses them.
            coordinator: handle of the job's `Coordinator` actor, which is told how busy this worker was.
        """
        exit_without_destructors()
        tell_origins()
        self._size_px = size_px
        self._image_column = image_column
        self._dropped = {*DECODED, ADDRESS} if keeps_image else {*DECODED, ADDRESS, image_column}
        self._loader = ImageLoader(fetch, limits.max_file_bytes)
        self._accepts_truncated = limits.accept_truncated
        self._pool = DecodePool(size_px, limits, 1)
        self._coordinator = coordinator
        self._worker = worker_name()
        self._started, self._busy_s = time.monotonic(), 0.0

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Decode a block in small tables, because a thousand small files become a large block of pixels."""
        shard = _shard_of(table)
        with noted(f"decoding {f'rows of {shard}' if shard else 'a table'}", shard):
            yield from self._decode_table(table)

    def _decode_table(self, table: pa.Table) -> Iterator[pa.Table]:
        for start in range(0, len(table), BATCH_ROWS):
            batch, row = table.slice(start, BATCH_ROWS), 0
            started = time.monotonic()
            for images in self._load(_cells(batch, self._image_column)):
                decoded = self._decode_images(batch.slice(row, len(images)), images)
                self._busy_s += time.monotonic() - started
                if self._coordinator is not None:
                    alive_s = time.monotonic() - self._started
                    self._coordinator.report.remote("decode", self._worker, self._busy_s, alive_s)
                yield decoded
                row, started = row + len(images), time.monotonic()

    def close(self) -> None:
        """End the decoding process."""
        self._loader.close()
        self._pool.close()

    def _load(self, cells: Sequence[Cell | Address]) -> Iterator[list[Cell]]:
        """Yield the images in order, in parts of limited size if some of them must be loaded."""
        loaded = self._loader.load(cell.text for cell in cells if isinstance(cell, Address))
        images: list[Cell] = []
        num_bytes = 0
        for cell in cells:
            if not isinstance(cell, Address):
                images.append(cell)
                continue
            content, status, error = next(loaded)
            images.append(content if status is None else DecodedImage(status=status, error=error))
            num_bytes += len(content or b"")
            if num_bytes >= LOADED_BYTES:
                yield images
                images, num_bytes = [], 0
        if images:
            yield images

    def _decode_images(self, table: pa.Table, images: Sequence[Cell]) -> pa.Table:
        hashes = [digest_of(image) for image in images]
        decoded = self._decode(images)
        rest = table.drop_columns([name for name in table.column_names if name in self._dropped])
        for name, column in _columns(decoded, hashes).items():
            rest = rest.append_column(name, column)
        if self._accepts_truncated:
            rest = rest.append_column(TRUNCATED, pa.array([image.is_truncated for image in decoded]))
        return rest

    def _decode(self, images: Sequence[Cell]) -> list[DecodedImage]:
        encoded = iter(self._pool.decode([i for i in images if i is None or isinstance(i, bytes)]))
        return [
            next(encoded) if image is None or isinstance(image, bytes) else self._resize(image)
            for image in images
        ]

    def _resize(self, image: np.ndarray | Image | DecodedImage) -> DecodedImage:
        """Resize an image that is already decoded."""
        if isinstance(image, DecodedImage):
            return image
        try:
            pixels = resize_image(image, self._size_px)
        except ValueError as error:
            return DecodedImage(status=Status.UNDECODABLE, error=str(error))
        width, height = upright_size(image)
        return DecodedImage(pixels=pixels.tobytes(), width=width, height=height)


def _shard_of(table: pa.Table) -> str | None:
    """Return the shard of the first row, for messages; a user's own dataset has none."""
    has_shard = "shard" in table.column_names and len(table)
    return table["shard"][0].as_py() if has_shard else None


def _cells(table: pa.Table, image_column: str) -> list[Cell | Address]:
    """Return the images of a table, or their addresses, or why a row has neither."""
    cells = read_images(table[image_column])
    if ADDRESS in table.column_names:
        addresses = table[ADDRESS].to_pylist()
        cells = [cell if a is None else Address(a) for cell, a in zip(cells, addresses, strict=True)]
    if {"status", "error"} <= set(table.column_names):  # a row with a status has failed while it was read
        statuses, errors = table["status"].to_pylist(), table["error"].to_pylist()
        cells = [
            cell if status is None else DecodedImage(status=Status(status), error=error)
            for cell, status, error in zip(cells, statuses, errors, strict=True)
        ]
    return cells


def _columns(decoded: Sequence[DecodedImage], hashes: Sequence[bytes | None]) -> dict[str, pa.Array]:
    return {
        "status": pa.array([image.status.value for image in decoded], pa.string()),
        "error": pa.array([image.error for image in decoded], pa.string()),
        "width": pa.array([image.width for image in decoded], pa.int32()),
        "height": pa.array([image.height for image in decoded], pa.int32()),
        "sha256": pa.array(hashes, pa.binary()),
        PIXELS: pa.array([image.pixels for image in decoded], pa.binary()),
    }
