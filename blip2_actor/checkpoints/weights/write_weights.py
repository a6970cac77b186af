"""Writing the weights of a model back under the names that they had in a checkpoint.

The name map is read in the other direction: each tensor of the checkpoint names the part of a parameter that
it fills, and that part is written in its place. Tensors go to the file one piece at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from blip2_actor.checkpoints.weights.load_weights import find_places
from blip2_actor.checkpoints.weights.name_map import Rule
from blip2_actor.checkpoints.weights.safetensors_file import DTYPES
from blip2_actor.checkpoints.weights.stored_tensor import PIECE_BYTES, StoredTensor


def tensors_to_write(
    model: nn.Module, tensors: Mapping[str, StoredTensor], rules: list[Rule]
) -> dict[str, Tensor]:
    """Return views of the weights by their names in the checkpoint.

    Args:
        model: a model like the checkpoint's.
        tensors: those of the checkpoint.
        rules: the name map.

    Raises:
        ValueError: the model is of another shape, is packed or quantized, or has weights that the checkpoint
            does not store.
    """
    places, mismatch = find_places(model, tensors, rules)
    if mismatch.unexpected:
        raise ValueError(
            f"the model must have the weights of the checkpoint, but lacks {mismatch.unexpected[0]}"
        )
    if mismatch.reshaped:
        raise ValueError(
            f"the model must have weights of the checkpoint's shapes, got {mismatch.reshaped[0]}; save a "
            "model of load_for_training, which is neither packed nor quantized"
        )
    if mismatch.missing:
        raise ValueError(
            f"the model must have no other weights than the checkpoint, got {', '.join(mismatch.missing)}"
        )
    return {place.name: place.elements.view(place.stored.shape) for place in places}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any device to a file, without a copy of them all."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name, tensor in tensors.items():
        start, stop = stop, stop + tensor.nbytes
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data begins at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            for piece in tensor.reshape(-1).split(PIECE_BYTES // tensor.itemsize):
                file.write(memoryview(piece.cpu().view(torch.uint8).numpy()))
