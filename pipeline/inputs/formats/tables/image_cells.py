"""What the cells of an image column hold: encoded bytes, base64, structs of bytes and path, or addresses.

A cell without a usable image becomes a row with a status and an error; it does not affect other rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from blip2_actor import Status
from pipeline.inputs.formats.addresses import refusal, resolve
from pipeline.inputs.formats.base64_text import HEAD_CHARS, decode_base64, looks_like_base64_image
from pipeline.inputs.formats.tables.columns import is_text
from pipeline.inputs.formats.tables.texts import escape_texts, not_utf8
from pipeline.inputs.reader import ReadOptions


@dataclass(frozen=True)
class Images:
    """The images of some rows; each list has an entry for each row."""

    encoded: pa.Array
    """Encoded bytes, or null."""
    addresses: list[str | None]
    statuses: list[Status | None]
    """Why a row has neither bytes nor an address."""
    errors: list[str | None]

    def refuse(self, reasons: Mapping[int, str]) -> Images:
        """Return the images with some rows refused; a row that has failed already keeps its own reason."""
        if not reasons:
            return self
        rows = range(len(self.statuses))
        return Images(
            pc.if_else(pa.array([row in reasons for row in rows], pa.bool_()), None, self.encoded),
            [None if row in reasons else self.addresses[row] for row in rows],
            [self.statuses[row] or (Status.REFUSED if row in reasons else None) for row in rows],
            [self.errors[row] or reasons.get(row) for row in rows],
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
    if is_text(cells.type):
        images = cells.cast(pa.string()).cast(pa.binary())
        images, reasons = _decoded(images, range(len(cells)), options.max_image_bytes)
    else:
        images = cells.cast(pa.binary())
        images, reasons = _decoded(images, _base64_cells(images, options), options.max_image_bytes)
    return _usable(images, paths, reasons, options, folder)


def _base64_cells(images: pa.Array, options: ReadOptions) -> list[int]:
    """Return which cells of bytes are base64: all, or those that look so."""
    if options.image_encoding == "base64":
        return list(range(len(images)))
    if options.schema_version == 1:
        return []
    heads = pc.binary_slice(images, 0, HEAD_CHARS).to_pylist()
    return [index for index, head in enumerate(heads) if head and looks_like_base64_image(head)]


def _decoded(images: pa.Array, indices: range | list[int], max_bytes: int) -> tuple[pa.Array, dict[int, str]]:
    """Decode the base64 of some cells.

    Returns:
        The images, and for each cell that is no base64 the reason. A text that is too long for an image of
        `max_bytes` stays as it is.
    """
    if not indices:
        return images, {}
    values, reasons = images.to_pylist(), dict[int, str]()
    for index in indices:
        if values[index] and len(values[index]) <= 2 * max_bytes:
            try:
                values[index] = decode_base64(values[index])
            except ValueError as error:
                values[index], reasons[index] = None, str(error)
    return pa.array(values, pa.binary()), reasons


def _usable(
    images: pa.Array, paths: pa.Array | None, reasons: dict[int, str], options: ReadOptions, folder: str
) -> Images:
    """Sort the cells into images, addresses and rows that fail."""
    lengths = pc.fill_null(pc.binary_length(images), 0)
    max_bytes = options.max_image_bytes
    usable = pc.and_(pc.greater(lengths, 0), pc.less_equal(lengths, max_bytes))
    addresses: list[str | None] = [None] * len(images)
    statuses: list[Status | None] = [None] * len(images)
    paths, not_text = (None, []) if paths is None else escape_texts(paths)
    errors: list[str | None] = [None] * len(images)
    for index in pc.indices_nonzero(pc.invert(usable)).to_pylist():
        is_null, path = not images[index].is_valid, None if paths is None else paths[index].as_py()
        path = path and path.strip()
        if path and options.fetch and not lengths[index].as_py() and index not in reasons:
            errors[index] = not_utf8("the address", path) if index in not_text else refusal(path, folder)
            if errors[index]:
                statuses[index] = Status.REFUSED
            else:
                addresses[index] = resolve(path, folder)
            continue
        statuses[index] = Status.MISSING_IMAGE
        if index in reasons:
            statuses[index], errors[index] = Status.UNDECODABLE, reasons[index]
        elif lengths[index].as_py() > max_bytes:
            statuses[index] = Status.TOO_LARGE
            errors[index] = f"the cell has {lengths[index]} bytes, more than {max_bytes}"
        elif path and is_null:
            errors[index] = f"the cell has no bytes, only the path {path!r}; embed the images, or use --fetch"
        else:
            errors[index] = "the cell is null" if is_null and path is None else "the cell is empty"
    return Images(pc.if_else(usable, images, None), addresses, statuses, errors)
