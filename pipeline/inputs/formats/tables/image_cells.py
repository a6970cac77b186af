"""What the cells of an image column hold: encoded bytes, base64, structs of bytes and path, or addresses.

A cell without a usable image becomes a row with a status and an error; it does not affect other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from blip2_actor import Status
from pipeline.inputs.formats.addresses import refusal, resolve
from pipeline.inputs.formats.base64_text import HEAD_CHARS, decode_base64, looks_like_base64_image
from pipeline.inputs.formats.tables.columns import is_text
from pipeline.inputs.formats.tables.texts import escape_texts, not_utf8
from pipeline.inputs.reader import ReadOptions

Failure = tuple[Status, str]
"""Why a row has neither an image nor an address."""


@dataclass(frozen=True)
class Images:
    """The images of some rows; rows are numbered from 0."""

    cells: pa.Array
    """Encoded bytes. Cells of rows with an address or a failure are not images."""
    addresses: dict[int, str]
    failures: dict[int, Failure]

    def refuse(self, row: int, reason: str) -> None:
        """Refuse a row; one that has failed already keeps its own reason."""
        self.failures.setdefault(row, (Status.REFUSED, reason))

    def columns(self) -> tuple[pa.Array, pa.Array, pa.Array, pa.Array]:
        """Return columns of images, statuses, errors and addresses."""
        rows = range(len(self.cells))
        is_image = [row not in self.failures and row not in self.addresses for row in rows]
        failures = [self.failures.get(row, (None, None)) for row in rows]
        addresses = [None if row in self.failures else self.addresses.get(row) for row in rows]
        return (
            pc.if_else(pa.array(is_image, pa.bool_()), self.cells, None),
            pa.array([status for status, _ in failures], pa.string()),
            pa.array([error for _, error in failures], pa.string()),
            pa.array(addresses, pa.string()),
        )


def read_cells(cells: pa.Array, options: ReadOptions, folder: str) -> Images:
    """Return what the cells of an image column hold.

    Args:
        cells: the column, of a type that `Columns.find` accepts.
        options: which form the images have, and their limit.
        folder: URI of the folder that relative paths are relative to.
    """
    paths = None
    if pa.types.is_struct(cells.type):
        names = {field.name for field in cells.type}
        paths = pc.struct_field(cells, "path") if "path" in names else None
        cells = pc.struct_field(cells, "bytes") if "bytes" in names else pa.nulls(len(cells), pa.binary())
    elif options.fetch:
        paths, cells = cells, pa.nulls(len(cells), pa.binary())
    images = cells.cast(pa.binary())
    is_base64 = is_text(cells.type) or options.image_encoding == "base64"
    rows = range(len(images)) if is_base64 else _base64_rows(images, options)
    images, failures = _decoded(images, rows, options.max_image_bytes)
    return _usable(images, paths, failures, options, folder)


def _base64_rows(images: pa.Array, options: ReadOptions) -> list[int]:
    """Return the cells of bytes that look like base64."""
    if options.schema_version == 1:
        return []
    heads = pc.binary_slice(images, 0, HEAD_CHARS).to_pylist()
    return [row for row, head in enumerate(heads) if head and looks_like_base64_image(head)]


def _decoded(images: pa.Array, rows: Sequence[int], max_bytes: int) -> tuple[pa.Array, dict[int, Failure]]:
    """Decode the base64 of some cells.

    Returns:
        The images, and the failures of cells that are not base64. A text that is too long for an image of
        `max_bytes` stays as it is.
    """
    if not rows:
        return images, {}
    values, failures = images.to_pylist(), dict[int, Failure]()
    for row in rows:
        if values[row] and len(values[row]) <= 2 * max_bytes:
            try:
                values[row] = decode_base64(values[row])
            except ValueError as error:
                failures[row] = Status.UNDECODABLE, str(error)
    return pa.array(values, pa.binary()), failures


def _usable(
    images: pa.Array,
    paths: pa.Array | None,
    failures: dict[int, Failure],
    options: ReadOptions,
    folder: str,
) -> Images:
    """Find the cells without a usable image: they have an address, or fail."""
    lengths = pc.fill_null(pc.binary_length(images), 0)
    max_bytes = options.max_image_bytes
    unusable = pc.or_(pc.equal(lengths, 0), pc.greater(lengths, max_bytes))
    paths, not_text = (None, []) if paths is None else escape_texts(paths)
    addresses: dict[int, str] = {}
    for row in pc.indices_nonzero(unusable).to_pylist():
        if row in failures:
            continue
        is_null, num_bytes = not images[row].is_valid, lengths[row].as_py()
        path = None if paths is None else paths[row].as_py()
        path = path and path.strip()
        if path and options.fetch and not num_bytes:
            reason = not_utf8("the address", path) if row in not_text else refusal(path, folder)
            if reason:
                failures[row] = Status.REFUSED, reason
            else:
                addresses[row] = resolve(path, folder)
        elif num_bytes > max_bytes:
            failures[row] = Status.TOO_LARGE, f"the cell has {num_bytes} bytes, more than {max_bytes}"
        elif path and is_null:
            reason = f"the cell has no bytes, only the path {path!r}; embed the images, or use --fetch"
            failures[row] = Status.MISSING_IMAGE, reason
        else:
            reason = "the cell is null" if is_null and path is None else "the cell is empty"
            failures[row] = Status.MISSING_IMAGE, reason
    return Images(images, addresses, failures)
