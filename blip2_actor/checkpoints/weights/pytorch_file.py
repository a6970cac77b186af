"""Reading a file that `torch.save` has written: the format of weights before safetensors.

Such a file is a pickle, and a pickle may run any program when it is read. So torch reads it with
`weights_only`, which takes tensors and plain containers and refuses everything else. The tensors are
memory-mapped: their pages belong to the operating system, which takes them back when it needs the memory.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from blip2_actor.checkpoints.weights.stored_tensor import PIECE_BYTES, StoredTensor


@dataclass(frozen=True)
class MappedTensor:
    """A tensor in a memory-mapped file."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the elements in order, in pieces (see `StoredTensor.pieces`)."""
        flat = self.tensor.reshape(-1)
        step = PIECE_BYTES // flat.element_size()
        for start in range(0, len(flat), step):
            yield start, flat[start : start + step]


def list_pytorch_tensors(path: Path, entry: str | None = None) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name.

    Args:
        path: the file.
        entry: name under which programs for training store the tensors, next to other entries that are not
            read; a file without it holds the tensors alone.

    Raises:
        OSError: the file is incomplete, or not of this format.
        ValueError: the file holds anything but tensors by name.
    """
    with path.open("rb") as file:
        start = file.read(2)
    is_archive = start == b"PK"  # files of torch before 1.6 are plain pickles, which cannot be mapped
    if not is_archive and not start.startswith(pickle.PROTO):
        raise _incomplete(path, f"a file that begins with {start!r}")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} must hold only tensors, got a pickle that may run a program when it is read; take the "
            "safetensors file of a source that you trust"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, LookupError) as error:
        raise _incomplete(path, type(error).__name__) from error
    if isinstance(loaded, Mapping) and entry in loaded:
        loaded = loaded[entry]
    if not isinstance(loaded, Mapping) or not all(isinstance(x, Tensor) for x in loaded.values()):
        found = f"entries {', '.join(map(str, [*loaded][:5]))}" if isinstance(loaded, Mapping) else "no names"
        raise ValueError(
            f"{path} must hold tensors by name, got {found}; save only the model's state_dict(), "
            "or better the model with save_pretrained"
        )
    return {str(name): MappedTensor(tensor) for name, tensor in loaded.items()}


def _incomplete(path: Path, found: str) -> OSError:
    return OSError(
        f"{path} must be a complete file of torch.save, got {found}; fetch it again, or take the "
        "safetensors file"
    )
