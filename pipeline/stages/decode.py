"""The decode stage: a column of images becomes a column of uint8 pixels at the model's size.

Encoded bytes end here; what travels on are pixels (null where the row has failed) and each row's
status. Neither float images nor Python objects ever cross the object store.
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
from pipeline.stages.worker_exit import end_without_ceremony
from pipeline.storage.filesystems import open_filesystem

PIXELS = "_blip2_pixels"
"""uint8[S, S, 3] as bytes, between the two stages only."""
DECODED = ("status", "error", "width", "height", "sha256")
"""What this stage says of each row."""
BATCH_ROWS = 128
"""Rows given to the decode children at once."""

Report = Callable[[str, float, float], None]
"""Takes a worker's name, its busy seconds and the seconds it has lived."""


class DecodeStage:
    """Decodes in child processes with limits; held by an actor of a Ray Data pool."""

    def __init__(
        self,
        size_px: int,
        limits: ImageLimits,
        image_column: str,
        keeps_image: bool = False,
        report: Report | None = None,
    ) -> None:
        end_without_ceremony()
        self._size_px = size_px
        self._image_column = image_column
        self._dropped = {*DECODED} if keeps_image else {*DECODED, image_column}
        self._pool = DecodePool(size_px, limits, 1)
        self._report = report
        self._worker = f"{os.uname().nodename}-{os.getpid()}"
        self._started, self._busy_s = time.monotonic(), 0.0

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Decode a block in small tables: a block of a thousand small files is a large one of pixels."""
        for start in range(0, len(table), BATCH_ROWS):
            yield self._decode_batch(table.slice(start, BATCH_ROWS))

    def close(self) -> None:
        """End the decoding child."""
        self._pool.close()

    def _decode_batch(self, table: pa.Table) -> pa.Table:
        started = time.monotonic()
        images, hashes = _images(table[self._image_column])
        settled = _settled(table)
        decoded = self._decode([None if fate else image for image, fate in zip(images, settled, strict=True)])
        decoded = [fate or image for fate, image in zip(settled, decoded, strict=True)]
        rest = table.drop_columns([name for name in table.column_names if name in self._dropped])
        for name, column in _columns(decoded, hashes).items():
            rest = rest.append_column(name, column)
        self._busy_s += time.monotonic() - started
        if self._report:
            self._report(self._worker, self._busy_s, time.monotonic() - self._started)
        return rest

    def _decode(self, images: Sequence[bytes | np.ndarray | None]) -> list[DecodedImage]:
        if any(isinstance(image, np.ndarray) for image in images):
            return [self._resize(image) for image in images]
        return self._pool.decode(list(images))  # type: ignore[arg-type]

    def _resize(self, image: Any) -> DecodedImage:
        if image is None:
            return DecodedImage(status=Status.MISSING_IMAGE, error="there is no image")
        try:
            pixels = resize_image(image, self._size_px)
        except ValueError as error:
            return DecodedImage(status=Status.UNDECODABLE, error=str(error))
        height, width = image.shape[:2]
        return DecodedImage(pixels=pixels.tobytes(), width=width, height=height)


def _settled(table: pa.Table) -> list[DecodedImage | None]:
    """The fates that reading has already settled, where the table says so."""
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
    """Images and the digests of their bytes: encoded bytes, or uint8[H, W, 3].

    Takes binary columns, the `datasets` library's struct of bytes and path, and columns of arrays.
    """
    if pa.types.is_struct(column.type):
        images: list[Any] = [_of_struct(value) for value in column.to_pylist()]
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


def _of_struct(value: dict[str, Any] | None) -> bytes | None:
    """The bytes of a `datasets` image, from its file where the table only names it."""
    if value is None or value.get("bytes") is not None or value.get("path") is None:
        return None if value is None else value.get("bytes")
    filesystem, path = open_filesystem(value["path"])
    try:
        with filesystem.open_input_stream(path, compression=None) as stream:
            return stream.readall()
    except OSError:
        return None
