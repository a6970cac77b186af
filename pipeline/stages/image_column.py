"""What a column of images may hold, and how its images are read from it.

A column holds encoded bytes, the `datasets` library's struct of bytes and path, PIL images, or arrays of one
of the layouts that `array_to_rgb` reads: tensors, or nested lists. If images are fetched, it may also hold
addresses as text. Nearly every other column is refused by its type before work begins. What only a row shows,
such as a path that does not exist, costs that row.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from PIL import Image
from ray.data.extensions import (
    ArrowPythonObjectType,
    ArrowTensorType,
    ArrowTensorTypeV2,
    ArrowVariableShapedTensorType,
)

from blip2_actor import DecodedImage, Status, require_image_layout
from pipeline.inputs.formats.addresses import refusal
from pipeline.inputs.formats.tables.columns import is_bytes, is_text
from pipeline.schema import to_plain

RAY_TYPES = (ArrowPythonObjectType, ArrowTensorType, ArrowTensorTypeV2, ArrowVariableShapedTensorType)
TAKEN = "encoded bytes, structs of bytes and path, PIL images or arrays"

Cell: TypeAlias = "bytes | np.ndarray | Image.Image | DecodedImage | None"
"""An image, or why there is none."""


@dataclass(frozen=True)
class Address:
    """The place of an image that must be loaded."""

    text: str


def require_images(name: str, type: Any, fetches: bool = False) -> None:
    """Raise ValueError, which names a column, unless a column of this type may hold images.

    Args:
        name: the column.
        type: its Arrow type, or its dtype in a pandas block.
        fetches: whether it may hold addresses as text.
    """
    if not isinstance(type, pa.DataType):
        if not isinstance(type, np.dtype) or type == np.dtype(object):
            return  # Only the rows show what the objects are.
        remedy = ""
    elif is_text(type):
        if fetches:
            return
        remedy = "; give fetch=FetchSettings() if it holds URLs or paths, or decode base64 with ds.map"
    elif pa.types.is_list(type) and _holds_bytes(type.value_type):
        remedy = "; make a row of each image with ds.flat_map"
    elif (layout := _layout(type)) is not None:
        try:
            require_image_layout(*layout)
        except ValueError as error:
            raise ValueError(f"image_column {name!r}: {error}") from None
        return
    elif _holds_bytes(type) or isinstance(type, ArrowPythonObjectType):
        return
    else:
        remedy = "; convert it to bytes with ds.map" if pa.types.is_list(type) else ""
    raise ValueError(f"image_column must hold {TAKEN}, got {name!r} of type {type}{remedy}")


def require_text(argument: str, name: str, type: Any) -> None:
    """Raise ValueError, which names a column, unless a column of this type may hold text.

    Args:
        argument: which column it is, for the message.
        name: the column.
        type: its Arrow type, or its dtype in a pandas block.
    """
    if isinstance(type, pa.DataType):
        holds_text = is_text(type) or pa.types.is_null(type)
    else:
        holds_text = not isinstance(type, np.dtype) or type == np.dtype(object)
    if not holds_text:
        raise ValueError(f"{argument} must hold text, got {name!r} of type {type}; convert it with ds.map")


def read_images(column: pa.ChunkedArray) -> list[Cell | Address]:
    """Return the images of a column, or the addresses of those that are elsewhere."""
    return [_require_image(cell) for chunk in column.chunks for cell in _cells_of_chunk(chunk)]


def digest_of(cell: Cell) -> bytes | None:
    """Return the SHA-256 of an image's bytes, or of its pixels if it is decoded; None if there is none."""
    if cell is None or isinstance(cell, DecodedImage):
        return None
    if isinstance(cell, Image.Image) and cell.mode in ("P", "PA"):
        cell = cell.convert("RGBA")  # equal indices are different pixels in another palette
    return hashlib.sha256(cell if isinstance(cell, bytes) else np.ascontiguousarray(cell).data).digest()


def _cells_of_chunk(chunk: pa.Array) -> list[Any]:
    if pa.types.is_struct(chunk.type):
        return [_read_struct(value) for value in chunk.to_pylist()]
    if is_text(chunk.type):
        return [_address(text.strip()) if text else None for text in chunk.to_pylist()]
    if isinstance(chunk.type, (pa.FixedShapeTensorType, *RAY_TYPES)):
        is_native = isinstance(chunk, pa.FixedShapeTensorArray)
        cells = chunk.to_numpy_ndarray() if is_native else chunk.to_numpy(zero_copy_only=False)
        valid = chunk.is_valid().to_pylist()
        return [cell if is_valid else None for cell, is_valid in zip(cells, valid, strict=True)]
    layout = _layout(chunk.type)
    cells = to_plain(chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk).to_pylist()
    return cells if layout is None else [_array(cell, layout[0]) for cell in cells]


def _layout(type: pa.DataType) -> tuple[np.dtype, tuple[int | None, ...]] | None:
    """Return dtype and shape of the arrays in a column, or None if it holds something else."""
    shape: tuple[int | None, ...]
    if isinstance(type, (pa.FixedShapeTensorType, ArrowTensorType, ArrowTensorTypeV2)):
        type, shape = type.value_type, tuple(type.shape)
    elif isinstance(type, ArrowVariableShapedTensorType):
        type, shape = type.storage_type.field("data").type.value_type, (None,) * type.ndim
    else:
        type, shape = type.storage_type if isinstance(type, pa.BaseExtensionType) else type, ()
        while pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type):
            shape += (type.list_size if pa.types.is_fixed_size_list(type) else None,)
            type = type.value_type
        if len(shape) < 2:
            return None
    if pa.types.is_integer(type) or pa.types.is_floating(type) or pa.types.is_boolean(type):
        return np.dtype(type.to_pandas_dtype()), shape
    return None


def _holds_bytes(type: pa.DataType) -> bool:
    if pa.types.is_struct(type):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in type)
    return is_bytes(type) or pa.types.is_fixed_size_binary(type) or pa.types.is_null(type)


def _array(value: Any, dtype: np.dtype) -> np.ndarray | DecodedImage | None:
    try:
        return None if value is None else np.array(value, dtype)
    except (TypeError, ValueError) as error:  # rows of different lengths, or a null among the numbers
        return DecodedImage(status=Status.UNDECODABLE, error=f"the lists are no array: {error}")


def _address(text: str) -> Address | DecodedImage:
    reason = refusal(text)
    return DecodedImage(status=Status.REFUSED, error=reason) if reason else Address(text)


def _read_struct(value: dict[str, Any] | None) -> bytes | Address | DecodedImage | None:
    """Return the bytes of a struct, or the address that it names."""
    if value is None or value.get("bytes") or not isinstance(value.get("path"), str):
        return None if value is None else value.get("bytes")
    return _address(value["path"].strip())


def _require_image(cell: Any) -> Cell | Address:
    if cell is None or isinstance(cell, (bytes, DecodedImage, Address)):
        return cell
    if isinstance(cell, (bytearray, memoryview)):
        return bytes(cell)
    try:
        if isinstance(cell, Image.Image):
            cell.load()
            return cell
        if isinstance(cell, np.ndarray):
            require_image_layout(cell.dtype, cell.shape)
            return cell
    except Exception as error:  # damaged PIL images raise errors of any class
        return DecodedImage(status=Status.UNDECODABLE, error=str(error))
    found = type(cell).__name__
    return DecodedImage(status=Status.UNDECODABLE, error=f"the cell must hold {TAKEN}, got {found}")
