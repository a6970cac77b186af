"""Reading a safetensors file piece by piece.

The library's own reader maps the file into memory, and every page that was read stays in this process's
memory until the file is closed: a second copy of the weights. Reading in pieces takes one small buffer.

Source: the format at https://huggingface.co/docs/safetensors (a length, a JSON header, the bytes).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from blip2_actor.checkpoints.weights.stored_tensor import PIECE_BYTES

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""torch's dtypes by their names in the file."""


@dataclass(frozen=True)
class SafetensorsTensor:
    """A tensor in a file, not read yet."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the elements in order, in pieces (see `StoredTensor.pieces`)."""
        buffer = torch.empty(min(PIECE_BYTES, self.num_bytes), dtype=torch.uint8)
        with self.path.open("rb") as file:
            file.seek(self.start)
            for done in range(0, self.num_bytes, PIECE_BYTES):
                piece = buffer[: self.num_bytes - done]
                view = cast("bytearray", piece.numpy())  # numpy's annotations do not say that it is a buffer
                if file.readinto(view) < len(piece):
                    raise OSError(
                        f"{self.path} must be a complete safetensors file, got an early end; fetch it again"
                    )
                yield done // self.dtype.itemsize, piece.view(self.dtype)


def list_safetensors(path: Path) -> dict[str, SafetensorsTensor]:
    """Return the tensors of a file by name.

    Raises:
        OSError: the file is not a safetensors file, or is incomplete.
        ValueError: a tensor has a dtype that is not supported.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            if header_size > size - 8:
                raise ValueError(f"a header of {header_size} bytes in a file of {size} bytes")
            header = json.loads(file.read(header_size))
        header.pop("__metadata__", None)
        unsupported = {entry["dtype"] for entry in header.values()} - DTYPES.keys()
        found = {
            name: SafetensorsTensor(
                path,
                DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
                8 + header_size + entry["data_offsets"][0],
            )
            for name, entry in header.items()
            if entry["dtype"] in DTYPES
        }
        for name, tensor in found.items():
            if tensor.start < 0 or tensor.start + tensor.num_bytes > size:
                raise ValueError(f"the tensor {name} beyond the end of the file ({size} bytes)")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise OSError(f"{path} must be a complete safetensors file, got {error}; fetch it again") from error
    if unsupported:
        raise ValueError(
            f"the dtypes of {path} must be among {', '.join(DTYPES)}, got {', '.join(sorted(unsupported))}; "
            "convert it with transformers' from_pretrained(…, dtype=torch.bfloat16) and save_pretrained"
        )
    return found
