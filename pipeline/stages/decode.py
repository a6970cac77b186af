"""The decode stage: a column of images becomes a column of uint8 pixels at the model's size.

Encoded bytes end here. The next stage gets pixels (null if the row has failed) and the status of each row.
Neither float images nor Python objects ever cross the object store.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from blip2_actor import DecodedImage, DecodePool, ImageLimits, Status, resize_image
from pipeline.stages.worker_exit import exit_without_destructors
from pipeline.storage.filesystems import open_filesystem

PIXELS = "_blip2_pixels"
"""Column with uint8[S, S, 3] as bytes; exists only between the decode and the caption stage."""
TRUNCATED = "_blip2_truncated"
"""Boolean column next to the pixels, if truncated images are accepted: whether the image is one."""
TRUNCATED_FLAG = "truncated"
"""A flag of rows whose image lacks its end."""
DECODED = ("status", "error", "width", "height", "sha256")
"""Columns that this stage adds to each row, besides the pixels."""
BATCH_ROWS = 128
"""Rows that are given to the decoding process at once."""

Report = Callable[[str, float, float], None]
"""Takes the name of a worker, its busy seconds and the seconds since it started."""


class DecodeStage:
    """Decodes in a child process with limits. An actor of a Ray Data pool holds it."""

    def __init__(
        self,
        size_px: int,
        limits: ImageLimits,
        image_column: str,
        keeps_image: bool = False,
        report: Report | None = None,
    ) -> None:
        """Start the decoding process.

        Args:
            size_px: image size of the model.
            limits: what decoding one image may cost.
            image_column: as in `CaptionSpec.image_column`.
            keeps_image: whether that column stays in the table.
            report: receives how busy this worker was.
        """
        exit_without_destructors()
        self._size_px = size_px
        self._image_column = image_column
        self._dropped = {*DECODED} if keeps_image else {*DECODED, image_column}
        self._accepts_truncated = limits.accept_truncated
        self._pool = DecodePool(size_px, limits, 1)
        self._report = report
        self._worker = f"{os.uname().nodename}-{os.getpid()}"
        self._started, self._busy_s = time.monotonic(), 0.0

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Decode a block in small tables: a thousand small files become a large block of pixels."""
        for start in range(0, len(table), BATCH_ROWS):
            yield self._decode_batch(table.slice(start, BATCH_ROWS))

    def close(self) -> None:
        """End the decoding process."""
        self._pool.close()

    def _decode_batch(self, table: pa.Table) -> pa.Table:
        started = time.monotonic()
        images, hashes = _images(table[self._image_column])
        failures = _failures(table)
        readable = [None if failed else image for image, failed in zip(images, failures, strict=True)]
        decoded = [failed or image for failed, image in zip(failures, self._decode(readable), strict=True)]
        rest = table.drop_columns([name for name in table.column_names if name in self._dropped])
        for name, column in _columns(decoded, hashes).items():
            rest = rest.append_column(name, column)
        if self._accepts_truncated:
            rest = rest.append_column(TRUNCATED, pa.array([image.is_truncated for image in decoded]))
        self._busy_s += time.monotonic() - started
        if self._report:
            self._report(self._worker, self._busy_s, time.monotonic() - self._started)
        return rest

    def _decode(self, images: Sequence[bytes | np.ndarray | None]) -> list[DecodedImage]:
        encoded = [image for image in images if not isinstance(image, np.ndarray)]
        if len(encoded) == len(images):
            return self._pool.decode(encoded)
        return [self._resize(image) for image in images]

    def _resize(self, image: Any) -> DecodedImage:
        """Resize an image that is already an array."""
        if image is None:
            return DecodedImage(status=Status.MISSING_IMAGE, error="there is no image")
        try:
            pixels = resize_image(image, self._size_px)
        except ValueError as error:
            return DecodedImage(status=Status.UNDECODABLE, error=str(error))
        height, width = image.shape[:2]
        return DecodedImage(pixels=pixels.tobytes(), width=width, height=height)


def _failures(table: pa.Table) -> list[DecodedImage | None]:
    """Return the rows that reading has already found to have failed; None for each other row."""
    if not {"status", "error"} <= set(table.column_names):
        return [None] * len(table)
    return [
        None if status is None else DecodedImage(status=Status(status), error=error)
        for status, error in zip(table["status"].to_pylist(), table["error"].to_pylist(), strict=True)
    ]


def _columns(decoded: Sequence[DecodedImage], hashes: Sequence[bytes | None]) -> dict[str, pa.Array]:
    return {
        "status": pa.array([image.status.value for image in decoded], pa.string()),
        "error": pa.array([image.error for image in decoded], pa.string()),
        "width": pa.array([image.width for image in decoded], pa.int32()),
        "height": pa.array([image.height for image in decoded], pa.int32()),
        "sha256": pa.array(hashes, pa.binary()),
        PIXELS: pa.array([image.pixels for image in decoded], pa.binary()),
    }


def _images(column: pa.ChunkedArray) -> tuple[list[Any], list[bytes | None]]:
    """Return the images of a column, encoded bytes or arrays of any layout, and the digests of their bytes.

    The column may hold binary values, the `datasets` library's struct of bytes and path, or arrays.
    """
    if pa.types.is_struct(column.type):
        images: list[Any] = [_bytes_of_struct(value) for value in column.to_pylist()]
    elif pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        images = column.to_pylist()
    else:
        images = [
            array if array is None else np.asarray(array)
            for chunk in column.chunks
            for array in _arrays(chunk)
        ]
    return images, [None if image is None else hashlib.sha256(_bytes(image)).digest() for image in images]


def _arrays(chunk: pa.Array) -> Sequence[Any]:
    if isinstance(chunk, pa.ExtensionArray):
        return chunk.to_numpy(zero_copy_only=False)
    return [None if value is None else np.array(value, np.uint8) for value in chunk.to_pylist()]


def _bytes(image: bytes | np.ndarray) -> bytes | memoryview:
    return np.ascontiguousarray(image).data if isinstance(image, np.ndarray) else image


def _bytes_of_struct(value: dict[str, Any] | None) -> bytes | None:
    """Return the bytes of a `datasets` image; read its file if the table has only the path."""
    if value is None or value.get("bytes") is not None or value.get("path") is None:
        return None if value is None else value.get("bytes")
    filesystem, path = open_filesystem(value["path"])
    try:
        with filesystem.open_input_stream(path, compression=None) as stream:
            return stream.readall()
    except OSError:
        return None
