"""A LoRA adapter merged into the weights while they are read, with the arithmetic of PEFT's `merge`.

LoRA (arXiv:2106.09685) adds to a matrix W the product of two small ones, scaling · B · A. The sum is made for
each piece of W as it is read, in float32, so it takes no memory, and W is rounded to the engine's dtype once.
The names are those of transformers' model, so a fused layer of ours needs no rule here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from blip2_actor.checkpoints.weights.adapter_config import AdapterConfig
from blip2_actor.checkpoints.weights.stored_tensor import StoredTensor, read_whole
from blip2_actor.checkpoints.weights.weight_files import ADAPTER_FILES, list_tensors

HEAD = "language_model.lm_head.weight"
EMBEDDINGS = "language_model.model.decoder.embed_tokens.weight"
"""OPT's; they are one tensor with the head, but an adapter changes only one of the two."""
T5_EMBEDDINGS = (
    "language_model.shared.weight",
    "language_model.encoder.embed_tokens.weight",
    "language_model.decoder.embed_tokens.weight",
)
_LORA = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B)(?:\.default)?(?:\.(weight|bias))?")
"""The name of a stored matrix: its module, which one it is, and whether it is the bias of B."""
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save(\.default)?)\.")
"""What PEFT puts into the names of trained tensors that take the place of the model's own."""


@dataclass(frozen=True)
class MergedTensor:
    """A stored tensor plus scaling · left · right."""

    stored: StoredTensor
    left: Tensor
    """float32[rows, R]; the rows are the tensor's first axis."""
    right: Tensor
    """float32[R, columns]; the columns are all its other axes."""
    scaling: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the elements of the sum in order, in pieces (see `StoredTensor.pieces`)."""
        columns = self.right.shape[1]
        for start, piece in self.stored.pieces():
            first, last = start // columns, (start + len(piece) - 1) // columns
            term = (self.left[first : last + 1] @ self.right).mul_(self.scaling).view(-1)
            offset = start - first * columns
            yield start, piece.float() + term[offset : offset + len(piece)]


def merge_adapter(tensors: Mapping[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a model with an adapter.

    Args:
        tensors: the model's, by their names in transformers.
        folder: folder of the adapter.

    Raises:
        ValueError: the adapter cannot be merged, or is not for this model; the message names the tensor.
        OSError: a file is missing or incomplete.
    """
    config = AdapterConfig.read(folder)
    path = next((folder / name for name in ADAPTER_FILES if (folder / name).exists()), None)
    if path is None:
        names = " or ".join(ADAPTER_FILES)
        raise FileNotFoundError(f"{folder} must hold {names}, got neither; fetch the adapter again")
    matrices: dict[str, dict[str, StoredTensor]] = {}
    replaced: dict[str, StoredTensor] = {}
    for name, stored in list_tensors(path).items():
        plain = name.removeprefix("base_model.model.")
        if match := _LORA.fullmatch(plain):
            module, matrix, kind = match.groups()
            matrices.setdefault(module, {})["bias" if kind == "bias" else matrix] = stored
        else:
            replaced[_WRAPPERS.sub(".", plain)] = stored
    changed = {f"{module}.weight" for module in matrices} | replaced.keys()
    if not changed:
        raise ValueError(f"{path} must hold the tensors of an adapter, got none; fetch the adapter again")
    changed |= {f"{module}.bias" for module, parts in matrices.items() if "bias" in parts}
    merged = _untied(dict(tensors), changed)
    _require_known(changed, merged, folder)
    merged |= replaced
    for module, parts in matrices.items():
        _merge_module(merged, module, parts, config)
    return merged


def _untied(tensors: dict[str, StoredTensor], changed: set[str]) -> dict[str, StoredTensor]:
    """Store the head and the embeddings both, if they are one tensor and only one of them is changed."""
    pair = {HEAD, EMBEDDINGS if EMBEDDINGS in tensors else T5_EMBEDDINGS[0]}
    stored = pair & tensors.keys()
    if pair & changed and len(stored) == 1:
        tensors |= dict.fromkeys(pair, tensors[stored.pop()])
    return tensors


def _require_known(changed: set[str], tensors: Mapping[str, StoredTensor], folder: Path) -> None:
    if unknown := sorted(changed - tensors.keys()):
        raise ValueError(
            f"the adapter in {folder} must be for this model, but changes {len(unknown)} tensors that it "
            f"does not have, such as {unknown[0]}; name the model that the adapter was trained on"
        )
    if shared := sorted(changed.intersection(T5_EMBEDDINGS)):
        raise ValueError(
            f"the adapter in {folder} must not change the embeddings of a T5, which encoder and decoder "
            f"share, got {', '.join(shared)}; use an adapter of other layers"
        )


def _merge_module(
    merged: dict[str, StoredTensor], module: str, parts: Mapping[str, StoredTensor], config: AdapterConfig
) -> None:
    """Replace a module's weight, and its bias if the adapter has one, by the sums."""
    name = f"{module}.weight"
    weight = merged[name]
    is_embedding = "embedding_A" in parts
    a, b = (parts.get(f"embedding_{matrix}" if is_embedding else matrix) for matrix in "AB")
    if a is None or b is None or min(len(a.shape), len(b.shape)) < 2 or 0 in (*a.shape, *b.shape):
        raise ValueError(
            f"the adapter in {config.folder} must have the matrices A and B of {module}, got "
            f"{[list(part.shape) for part in parts.values()]}; save it again with save_pretrained"
        )
    scaling = config.scaling(module, a.shape[0])
    left, right = read_whole(b).flatten(1), read_whole(a).flatten(1)
    if is_embedding:
        left, right = right.T, left.T  # the rows of its weight are tokens, and those of B are channels
    rows = weight.shape[0] if weight.shape else 1
    if (len(left), right.shape[1]) != (rows, prod(weight.shape[1:])) or left.shape[1] != len(right):
        raise ValueError(
            f"the adapter in {config.folder} must be for this model, but its matrices of {module} have the "
            f"shapes {list(b.shape)} and {list(a.shape)}, which do not fit {list(weight.shape)}; name the "
            "model that it was trained on"
        )
    merged[name] = MergedTensor(weight, left.contiguous(), right.contiguous(), scaling)
    if "bias" in parts:
        bias = read_whole(parts["bias"])[:, None]
        merged[f"{module}.bias"] = MergedTensor(merged[f"{module}.bias"], bias, torch.ones(1, 1), scaling)
