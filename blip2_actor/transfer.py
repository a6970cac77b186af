"""Host values to tensors on a device, without waiting for what the device is doing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(
    values: Sequence[Any] | np.ndarray, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor of host values, without waiting for what the device is doing.

    Thousands of numbers are read from an array in a fifth of the time that a list takes.

    `torch.tensor(…, device="cuda")` copies from memory that may be paged out, and waits for the copy, which
    waits for everything queued before it.
    """
    on_host = torch.tensor(values, dtype=dtype)  # pinned in a second step: from an array it can't be at once
    return on_host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else on_host


def ids_to_device(sequences: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Token ids, int64[T_i] each, in one copy."""
    flat = to_device([token_id for ids in sequences for token_id in ids], device)
    return list(flat.long().split([len(ids) for ids in sequences]))  # what has no ids at all is no int64
