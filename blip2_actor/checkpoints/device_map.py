"""A model over several devices: what does not fit the main one lies on others, in memory or on disk.

The plan is accelerate's (`infer_auto_device_map`), and so are the hooks that bring weights and inputs
together. They hang on the leaves (linear layers, norms), because layers are called by methods other than
`forward`; between the leaves everything is on the main device, the slots too.

Weights for the disk are written into a file without a name as they are loaded, and mapped: they come into
memory when they are used, and go when it is wanted for something else.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
from accelerate import infer_auto_device_map
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import get_balanced_memory, get_max_memory
from torch import Tensor, nn

from blip2_actor.device import resolve_device

WHOLE_LAYERS = ["VisionBlock", "QFormerLayer", "OptLayer", "T5Layer"]
"""Modules that are never cut in two."""
KEPT_ON_MAIN = ("embed_tokens", "embed_positions", "lm_head")
"""Small, used at every step, or shared."""
ACCELERATOR_SHARE = 0.8
"""Of an accelerator's free memory for weights; the rest is for activations and slots."""


class Split:
    """Where each part of one model lies."""

    def __init__(self, model: nn.Module, device_map: str, main: torch.device, offload_folder: Path) -> None:
        """
        Args:
            model: on the meta device, in its final dtypes.
            device_map: as in `EngineConfig.device_map`.
            main: where inputs come and slots are.
            offload_folder: on a disk with room for what memory does not hold.

        Raises:
            ValueError: the map names a module or a device that does not exist.
        """
        self.model = model
        self.main = str(main)
        self.offload_folder = offload_folder
        named = json.loads(device_map) if device_map.startswith("{") else _plan(model, device_map, main)
        self._places = {name: _place(place) for name, place in named.items()}
        known = {name for name, _ in model.named_modules()}
        if unknown := sorted(self._places.keys() - known):
            raise ValueError(
                f"device_map must name modules of the model, got {', '.join(unknown)}; "
                f"it has {', '.join(name for name, _ in model.named_children())} and what is in them"
            )

    def place_of(self, name: str, module: nn.Module) -> str:
        """A device, or "disk": that of the longest name that leads to the module."""
        if next(module.children(), None) is not None or name.rpartition(".")[2] in KEPT_ON_MAIN:
            return self.main
        parts = name.split(".")
        prefixes = [".".join(parts[:n]) for n in range(len(parts), -1, -1)]
        return next((self._places[p] for p in prefixes if p in self._places), self.main)

    def materialize(self) -> None:
        """Give each parameter its memory, uninitialised; loading writes straight into it."""
        for name, module in self.model.named_modules():
            place = self.place_of(name, module)
            for key, parameter in module.named_parameters(recurse=False):
                tensor = (
                    self._on_disk(parameter) if place == "disk" else torch.empty_like(parameter, device=place)
                )
                setattr(module, key, nn.Parameter(tensor, requires_grad=False))

    def attach(self) -> None:
        """Let each leaf bring its weights and inputs together; after everything is loaded."""
        for name, module in self.model.named_modules():
            place = self.place_of(name, module)
            weights = dict(module.named_parameters(recurse=False))
            if not weights or place == self.main:
                continue
            if place in ("cpu", "disk"):
                hook = AlignDevicesHook(
                    self.main, offload=True, weights_map={key: w.data for key, w in weights.items()}
                )
            else:
                hook = AlignDevicesHook(place, io_same_device=True)
            add_hook_to_module(module, hook)

    def _on_disk(self, like: Tensor) -> Tensor:
        """Memory that is a file, which lives as long as it is mapped."""
        if like.numel() == 0:
            return torch.empty_like(like, device="cpu")
        self.offload_folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.offload_folder) as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is an OSError now, and a dead process later
                os.posix_fallocate(file.fileno(), 0, like.nbytes)
            flat = torch.from_file(file.name, shared=True, size=like.nbytes, dtype=torch.uint8)
        return flat.view(like.dtype).view(like.shape)


def _plan(model: nn.Module, strategy: str, main: torch.device) -> dict[str, int | str]:
    """accelerate's own plan, from free memory."""
    memory = get_max_memory()
    if main.type == "cpu":
        memory = {"cpu": memory["cpu"]}
    elif main.index != 0:
        memory = {main.index: memory.pop(main.index), **memory}
    memory = {k: v if k == "cpu" else int(v * ACCELERATOR_SHARE) for k, v in memory.items()}
    if strategy != "sequential":
        memory = get_balanced_memory(model, memory, no_split_module_classes=WHOLE_LAYERS)
    plan = infer_auto_device_map(model, memory, no_split_module_classes=WHOLE_LAYERS)
    modules = dict(model.named_modules())
    return {name: place for name, place in plan.items() if name in modules}  # and not single parameters


def _place(place: int | str) -> str:
    """ "disk", or a device; raises ValueError where there is no such device."""
    if place == "disk":
        return place
    return str(resolve_device(f"cuda:{place}" if isinstance(place, int) else place))
