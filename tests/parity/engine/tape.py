"""Do on a CPU what a CUDA graph does: repeat the operations of one call on the same buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

READS_BACK = torch.ops.aten._local_scalar_dense.default
"""The operation behind `.item()`, `.tolist()` and `if tensor:`."""


class Tape(TorchDispatchMode):
    """Captures steps. Whatever the host decides during the capture, above all shapes, is fixed afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.num_captured = 0
        self._entries: list[tuple[Any, Any, Any, Any]] = []

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        entries: list[tuple[Any, Any, Any, Any]] = []
        self._entries = entries
        with self:
            step()
        self.num_captured += 1

        def replay() -> None:
            made: dict[int, Tensor] = {}

            def now(value: Any) -> Any:
                return made.get(id(value), value) if isinstance(value, Tensor) else value

            for function, args, kwargs, output in entries:
                again = function(*tree_map(now, args), **tree_map(now, kwargs))
                for old, new in zip(tree_iter(output), tree_iter(again), strict=True):
                    if isinstance(old, Tensor):
                        made[id(old)] = new

        return replay

    def forget(self) -> None:
        pass

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is READS_BACK:
            raise RuntimeError("a captured step must not read a value from the device")
        output = function(*args, **(kwargs or {}))
        self._entries.append((function, args, kwargs or {}, output))
        return output
