"""Copy host values to tensors on a device, without waiting for what the device is doing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(
    values: Sequence[Any] | np.ndarray, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Return host values as a tensor on a device.

    The host does not wait: `torch.tensor(…, device="cuda")` copies from pageable memory and waits for the
    copy, which waits for everything queued before it. This copies from pinned memory instead.

    For thousands of numbers, an array takes a fifth of the time that a list takes.
    """
    on_host = torch.tensor(values, dtype=dtype)  # torch cannot pin it here if it is an array
    return on_host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else on_host


def ids_to_device(sequences: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Return token ids as tensors on a device, int64[T_i] each, in one copy."""
    flat = to_device([token_id for ids in sequences for token_id in ids], device)
    return list(flat.long().split([len(ids) for ids in sequences]))  # without any ids, torch makes floats


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Copy a tensor; on a CPU the array would otherwise share the engine's memory, and keep a whole batch."""
    copied: np.ndarray = tensor.float().cpu().numpy().copy()
    return copied
