"""Reading the weights of a checkpoint into a model.

The name map (`name_map.py`) says where each tensor goes. It is strict: a tensor that is missing, unexpected
or of another shape is an error, found before any weights are read. Each tensor is then read from its file
straight into its parameter (or into its part of a fused one), so that the weights are in memory only once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from blip2_actor.checkpoints.weights.mismatch import Mismatch
from blip2_actor.checkpoints.weights.name_map import UNUSED, Rule, find_target
from blip2_actor.checkpoints.weights.stored_tensor import StoredTensor


def load_weights(
    model: nn.Module,
    tensors: Mapping[str, StoredTensor],
    rules: list[Rule],
    origin: str,
    later: Collection[str] = (),
) -> dict[str, Callable[[], None]]:
    """Fill every parameter of `model`.

    Args:
        model: the model, with its memory allocated.
        tensors: the weights by their names in the checkpoint.
        rules: the name map.
        origin: where the tensors are from, for messages.
        later: names of parameters that are not filled yet.

    Returns:
        For each parameter in `later`, a function that fills it.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape (and nothing has been read), or two
            tensors that should be equal differ.
        OSError: a file is incomplete.
    """
    plan = _plan_reading(model, tensors, rules)
    plan.mismatch.refuse(origin)
    waiting: dict[str, list[tuple[StoredTensor, Tensor]]] = {name: [] for name in later}
    for name, (stored, destination) in plan.reads.items():
        parameter = plan.targets[name]
        if parameter in waiting:
            waiting[parameter].append((stored, destination))
        else:
            _fill([(stored, destination)])
    for name, (stored, destination) in plan.repeats.items():
        if not _equals(stored, destination):
            raise ValueError(
                f"{name} in {origin} differs from the tensor that it should equal; save the model again with "
                "save_pretrained"
            )
    return {name: partial(_fill, reads) for name, reads in waiting.items()}


def _fill(reads: Iterable[tuple[StoredTensor, Tensor]]) -> None:
    for stored, destination in reads:
        for start, piece in stored.pieces():
            destination[start : start + len(piece)].copy_(piece)


@dataclass
class _ReadingPlan:
    """Tensors by their names in the checkpoint, each with the flat memory that it fills."""

    reads: dict[str, tuple[StoredTensor, Tensor]] = field(default_factory=dict)
    targets: dict[str, str] = field(default_factory=dict)
    """The parameter that each tensor of `reads` fills."""
    repeats: dict[str, tuple[StoredTensor, Tensor]] = field(default_factory=dict)
    """Tensors for memory that another one fills: shared weights that are stored more than once."""
    mismatch: Mismatch = field(default_factory=Mismatch)


def _plan_reading(model: nn.Module, tensors: Mapping[str, StoredTensor], rules: list[Rule]) -> _ReadingPlan:
    plan = _ReadingPlan()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    num_filled: dict[int, dict[int | None, int]] = {id(p): {} for p in parameters.values()}
    for name, stored in tensors.items():
        target = find_target(name, rules)
        if target is None or target.name not in parameters:
            if not UNUSED.fullmatch(name):
                plan.mismatch.unexpected.append(name)
            continue
        parameter = parameters[target.name]
        parts = num_filled[id(parameter)]
        destination = slice_of(parameter.data, target.part, stored.shape)
        if destination is None:
            shapes = f"({list(stored.shape)}, which does not fit {list(parameter.shape)})"
            plan.mismatch.reshaped[name] = shapes
            parts[target.part] = 0
        elif target.part in parts:
            plan.repeats[name] = stored, destination
        else:
            plan.reads[name] = stored, destination
            plan.targets[name] = target.name
            parts[target.part] = destination.numel()
    plan.mismatch.missing += [
        name
        for name, p in parameters.items()
        if sum(num_filled[id(p)].values()) != p.numel() and 0 not in num_filled[id(p)].values()
    ]
    return plan


def slice_of(parameter: Tensor, part: int | None, shape: tuple[int, ...]) -> Tensor | None:
    """Return the flat elements of `parameter` that a tensor of `shape` fills, or None if it does not fit."""
    if part is None:
        fits = parameter.numel() == prod(shape) and parameter.shape[:1] == shape[:1]
        return parameter.view(-1) if fits else None
    rows = shape[0] if shape else 0
    destination = parameter[part * rows : (part + 1) * rows]
    return destination.view(-1) if destination.shape == shape else None


def _equals(stored: StoredTensor, loaded: Tensor) -> bool:
    return all(torch.equal(loaded[i : i + len(piece)], piece.to(loaded)) for i, piece in stored.pieces())
