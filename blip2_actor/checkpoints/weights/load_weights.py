"""Reading the weights of a checkpoint into a model.

The name map (`name_map.py`) says where each tensor goes. It is strict: a tensor that is missing, unexpected
or of another shape is an error, found before any weights are read. Each tensor is then read from its file
straight into its parameter (or into its part of a fused one), so that the weights are in memory only once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from blip2_actor.checkpoints.weights.mismatch import Mismatch
from blip2_actor.checkpoints.weights.name_map import UNUSED, Rule, find_target
from blip2_actor.checkpoints.weights.stored_tensor import StoredTensor


@dataclass(frozen=True)
class Place:
    """A tensor of a checkpoint, and the memory of a model that it fills."""

    name: str
    """Name of the tensor in the checkpoint."""
    stored: StoredTensor
    parameter: str
    """Our name of the parameter."""
    elements: Tensor
    """The elements of the parameter that the tensor fills, flat."""
    memory: tuple[int, int | None]
    """The same for all tensors that fill the same elements: shared weights that are stored more than once."""


def find_places(
    model: nn.Module, tensors: Mapping[str, StoredTensor], rules: list[Rule]
) -> tuple[list[Place], Mismatch]:
    """Return where the tensors of a checkpoint go, and what does not fit."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    places, mismatch, reshaped = [], Mismatch(), set()
    for name, stored in tensors.items():
        target = find_target(name, rules)
        parameter = None if target is None else parameters.get(target.name)
        if target is None or parameter is None:
            if not UNUSED.fullmatch(name):
                mismatch.unexpected.append(name)
            continue
        elements = _slice_of(parameter.detach(), target.part, stored.shape)
        if elements is None:
            shapes = f"{list(stored.shape)}, which does not fit {list(parameter.shape)}"
            mismatch.reshaped.append(f"{name} ({shapes})")
            reshaped.add(id(parameter))
        else:
            places.append(Place(name, stored, target.name, elements, (id(parameter), target.part)))
    num_filled: Counter[int] = Counter()
    for place in {place.memory: place for place in places}.values():
        num_filled[place.memory[0]] += place.elements.numel()
    mismatch.missing += [
        name for name, p in parameters.items() if num_filled[id(p)] != p.numel() and id(p) not in reshaped
    ]
    return places, mismatch


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
    places, mismatch = find_places(model, tensors, rules)
    mismatch.refuse(origin)
    first: dict[tuple[int, int | None], Place] = {}
    repeats = [place for place in places if first.setdefault(place.memory, place) is not place]
    waiting: dict[str, list[Place]] = {name: [] for name in later}
    for place in first.values():
        if place.parameter in waiting:
            waiting[place.parameter].append(place)
        else:
            _fill([place])
    for place in repeats:
        if not _is_filled(place):
            raise ValueError(
                f"{place.name} in {origin} differs from the tensor that it should equal; save the model "
                "again with save_pretrained"
            )
    return {name: partial(_fill, places) for name, places in waiting.items()}


def _fill(places: Iterable[Place]) -> None:
    for place in places:
        for start, piece in place.stored.pieces():
            place.elements[start : start + len(piece)].copy_(piece)


def _is_filled(place: Place) -> bool:
    """Return whether a tensor equals the memory that it would fill."""
    loaded = place.elements
    return all(torch.equal(loaded[i : i + len(x)], x.to(loaded)) for i, x in place.stored.pieces())


def _slice_of(parameter: Tensor, part: int | None, shape: tuple[int, ...]) -> Tensor | None:
    """Return the flat elements of `parameter` that a tensor of `shape` fills, or None if it does not fit."""
    if part is None:
        fits = parameter.numel() == prod(shape) and parameter.shape[:1] == shape[:1]
        return parameter.view(-1) if fits else None
    rows = shape[0] if shape else 0
    destination = parameter[part * rows : (part + 1) * rows]
    return destination.view(-1) if destination.shape == shape else None
