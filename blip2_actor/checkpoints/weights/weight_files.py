"""Which files of a folder hold the weights: the ones that transformers reads, in its order.

A folder may hold weights more than once, such as a fine-tuned `model.safetensors` that was copied over the
shards of its base. The first kind of `_KINDS` counts, and the others are not read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from blip2_actor.checkpoints.weights.adapter_config import ADAPTER_CONFIG
from blip2_actor.checkpoints.weights.pytorch_file import list_pytorch_tensors
from blip2_actor.checkpoints.weights.safetensors_file import list_safetensors
from blip2_actor.checkpoints.weights.stored_tensor import StoredTensor

logger = logging.getLogger(__name__)

_KINDS = (
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-*-of-*.safetensors"),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)
"""Patterns of the files of each kind; the kind counts if its first file is there."""
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""Names of the weights of an adapter, the one that counts first."""
_POINTER = b"version https://git-lfs"
"""Beginning of a file that git has cloned without its content."""
_PREFIXES = ("module.", "_orig_mod.", "model.", "blip.")
"""What DistributedDataParallel, torch.compile, training loops and transformers put in front of every name."""


def has_safetensors(names: Iterable[str]) -> bool:
    """Return whether a folder with files of these names has its weights in safetensors."""
    return not {_KINDS[0][0], _KINDS[1][0]}.isdisjoint(names)


def unread_weights(names: Sequence[str]) -> list[str]:
    """Return those of a folder's file names that hold weights and are not read, because others count."""
    unread = []
    for kinds in (_KINDS, [(name,) for name in ADAPTER_FILES]):
        first = next((i for i, kind in enumerate(kinds) if kind[0] in names), len(kinds))
        patterns = [pattern for kind in kinds[first + 1 :] for pattern in kind]
        unread += [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
    return unread


def list_weights(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a checkpoint by their names in transformers' model; nothing is read yet.

    A prefix of a wrapper is left out, if every name has it.

    Raises:
        OSError: a file is missing, incomplete or of another format.
        ValueError: a file holds something that cannot be read.
    """
    names = sorted(path.name for path in folder.iterdir())
    kind = next((patterns for patterns in _KINDS if patterns[0] in names), None)
    if kind is None:
        raise FileNotFoundError(_no_weights(folder, names))
    if unread := unread_weights(names):
        logger.warning(
            "%s holds weights more than once: read %s, but not %s; delete what is out of date",
            folder,
            kind[0],
            _shortened(unread),
        )
    shards = _shards(folder / kind[0]) if len(kind) > 1 else [folder / kind[0]]
    tensors: dict[str, StoredTensor] = {}
    for path in shards:
        if not path.exists():
            raise FileNotFoundError(
                f"no such file: {path}, which {kind[0]} names; fetch the checkpoint again, or delete "
                f"{kind[0]} if the weights are in another file"
            )
        tensors |= list_tensors(path)
    return _without_prefixes(tensors)


def list_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one file by name; raises what `list_weights` raises."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise OSError(
                f"{path} must hold the weights, got a pointer of Git LFS; run git lfs pull in its folder"
            )
    return {**(list_safetensors(path) if path.suffix == ".safetensors" else list_pytorch_tensors(path))}


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("the name of a file in another folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"{index} must list the files of the weights, got {error!r}; fetch it again") from error
    return [index.parent / name for name in names]


def _without_prefixes(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    while tensors:
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), None)
        if prefix is None:
            break
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _no_weights(folder: Path, names: list[str]) -> str:
    """Return what to say about a folder without weights, after the files that it holds instead."""
    message = f"{folder} must hold weights ({', '.join(patterns[0] for patterns in _KINDS)}), got none"
    if ADAPTER_CONFIG in names:
        return (
            f"{message}, but an adapter; set --model to the model that it adapts, and --adapter to {folder}"
        )
    if others := [name for name in names if Path(name).suffix in (".pth", ".pt", ".ckpt", ".gguf")]:
        return (
            f"{message} of these, but {_shortened(others)}; save the model with save_pretrained, or for a "
            f".pth of LAVIS set --model to the checkpoint that it began with, and --adapter to the file"
        )
    return f"{message}; fetch the checkpoint again"


def _shortened(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
