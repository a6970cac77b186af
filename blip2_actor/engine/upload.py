"""Images on their way to a GPU.

The host gathers them in pinned memory that is used again for every batch, because pinning a batch takes
longer than copying it. They travel on a stream of their own, next to what the device computes, and as uint8,
a quarter of their size as float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from blip2_actor.engine.encoded_image import EncodedImage


def stack_pixels(images: Sequence[EncodedImage]) -> Tensor:
    """Return the pixels of a batch as uint8[B, S, S, 3], on the CPU."""
    return torch.from_numpy(np.stack([image.pixels for image in images]))


class Upload:
    """Brings batches of images to a GPU. It also works on a CPU, without gain."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        is_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_gpu else None
        self._arrived = torch.cuda.Event() if is_gpu else None
        self._host: Tensor | None = None

    def __call__(self, images: Sequence[EncodedImage]) -> Tensor:
        """Return a batch on the device: uint8[B, S, S, 3].

        The host does not wait for the copy; work that is queued on the current stream after this call does.
        """
        rows = self._gather(images)
        with torch.cuda.stream(self._stream):  # None changes nothing
            batch = rows.to(self._device, non_blocking=True, copy=True)
        if self._arrived is not None:
            self._arrived.record(self._stream)
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._arrived)
            batch.record_stream(current)  # its memory was allocated on the other stream
        return batch

    def _gather(self, images: Sequence[EncodedImage]) -> Tensor:
        """Copy the pixels into the host buffer, after the last batch has left it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        shape = (len(images), *images[0].pixels.shape)
        if self._host is None or len(self._host) < len(images):
            self._host = torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        rows = self._host[: len(images)]
        np.stack([image.pixels for image in images], out=rows.numpy())
        return rows
