"""A model split over several devices: modules that do not fit on the main device are on others or on disk.

The plan is accelerate's (`infer_auto_device_map`), and so are the hooks that bring weights and inputs
together. The hooks are on the leaves (linear layers, norms), because our layers are called by methods other
than `forward`. Between the leaves everything is on the main device, including the KV cache.

Weights on disk are written into an unnamed file while they are loaded, and that file is memory-mapped: the
operating system reads them into memory when they are used and drops them when it needs the memory.
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
"""Modules that are never split over two devices."""
KEPT_ON_MAIN = ("embed_tokens", "embed_positions", "lm_head")
"""Modules that stay on the main device: they are small, used in every step, or shared."""
ACCELERATOR_SHARE = 0.8
"""Share of an accelerator's free memory for weights; the rest is for activations and the KV cache."""


class ModelSplit:
    """The place of each module of one model: a device, or "disk"."""

    def __init__(self, model: nn.Module, device_map: str, main: torch.device, offload_folder: Path) -> None:
        """
        Args:
            model: on the meta device, in its final dtypes.
            device_map: as in `EngineConfig.device_map`.
            main: device of the inputs and of the KV cache.
            offload_folder: for weights on disk; must have room for them.

        Raises:
            ValueError: `device_map` names a module or a device that does not exist.
        """
        self.model = model
        self.main = str(main)
        self.offload_folder = offload_folder
        named = json.loads(device_map) if device_map.startswith("{") else _plan(model, device_map, main)
        self._places = {name: _resolve_place(place) for name, place in named.items()}
        known = {name for name, _ in model.named_modules()}
        if unknown := sorted(self._places.keys() - known):
            raise ValueError(
                f"device_map must name modules of the model, got {', '.join(unknown)}; the model has "
                f"{', '.join(name for name, _ in model.named_children())} and the modules inside them"
            )

    def place_of(self, name: str, module: nn.Module) -> str:
        """Return the device of a module, or "disk".

        It is the place of the longest name in the map that is the module's own or that of a parent.
        """
        if next(module.children(), None) is not None or name.rpartition(".")[2] in KEPT_ON_MAIN:
            return self.main
        parts = name.split(".")
        prefixes = [".".join(parts[:n]) for n in range(len(parts), -1, -1)]
        return next((self._places[p] for p in prefixes if p in self._places), self.main)

    def materialize(self) -> None:
        """Allocate each parameter, uninitialized, at its place; loading writes into it."""
        for name, module in self.model.named_modules():
            place = self.place_of(name, module)
            for key, parameter in module.named_parameters(recurse=False):
                tensor = (
                    self._on_disk(parameter) if place == "disk" else torch.empty_like(parameter, device=place)
                )
                setattr(module, key, nn.Parameter(tensor, requires_grad=False))

    def attach(self) -> None:
        """Add the hooks that bring weights and inputs together; call it after the weights are loaded."""
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
        """Return a tensor in a memory-mapped file, which exists as long as the tensor does."""
        if like.numel() == 0:
            return torch.empty_like(like, device="cpu")
        self.offload_folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.offload_folder) as file:
            if hasattr(os, "posix_fallocate"):
                # A full disk raises OSError here; otherwise it would kill the process later.
                os.posix_fallocate(file.fileno(), 0, like.nbytes)
            flat = torch.from_file(file.name, shared=True, size=like.nbytes, dtype=torch.uint8)
        return flat.view(like.dtype).view(like.shape)


def _plan(model: nn.Module, strategy: str, main: torch.device) -> dict[str, int | str]:
    """Return accelerate's plan for the free memory: names of modules, and a GPU's number, "cpu" or "disk"."""
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
    # The plan also names single parameters, which `place_of` never looks up.
    return {name: place for name, place in plan.items() if name in modules}


def _resolve_place(place: int | str) -> str:
    """Return "disk" or the full name of a device.

    Raises:
        ValueError: this machine has no such device.
    """
    if place == "disk":
        return place
    return str(resolve_device(f"cuda:{place}" if isinstance(place, int) else place))
