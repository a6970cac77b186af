"""Images on their way to the device.

A GPU is sent the next batch while it decodes: the host gathers the images in pinned memory that is used
again and again (pinning a batch takes longer than copying it), and they travel on a stream of their own as
uint8, a quarter of their size as float32. When the encoder's turn comes they are there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from blip2_actor.engine.request_state import EncodedImage


def stack_pixels(images: Sequence[EncodedImage]) -> Tensor:
    """uint8[B, S, S, 3], on the CPU."""
    return torch.from_numpy(np.stack([image.pixels for image in images]))


class Upload:
    """Brings batches of images to a GPU, one batch ahead where that helps. (On a CPU nothing is gained.)"""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        is_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_gpu else None
        self._arrived = torch.cuda.Event() if is_gpu else None
        self._host: Tensor | None = None
        self._sent: tuple[list[EncodedImage], Tensor] | None = None

    @property
    def has_sent(self) -> bool:
        return self._sent is not None

    def send(self, images: Sequence[EncodedImage]) -> None:
        """Start bringing a batch to the device; `take` gives it."""
        rows = self._gather(images)
        with torch.cuda.stream(self._stream):  # None changes nothing
            self._sent = list(images), rows.to(self._device, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record(self._stream)

    def take(self, images: Sequence[EncodedImage]) -> Tensor:
        """The batch on the device, uint8[B, S, S, 3], valid until the next `send`; sent now if it was not.

        The host does not wait: whatever is launched from here on does.
        """
        if self._sent is None or [*map(id, self._sent[0])] != [*map(id, images)]:
            self.send(images)
        assert self._sent is not None  # by `send`
        batch, self._sent = self._sent[1], None
        if self._arrived is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._arrived)
            batch.record_stream(current)  # its memory belongs to the other stream
        return batch

    def _gather(self, images: Sequence[EncodedImage]) -> Tensor:
        """The pixels side by side in the buffer, once its last batch has left it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        shape = (len(images), *images[0].pixels.shape)
        if self._host is None or len(self._host) < len(images):
            self._host = torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        rows = self._host[: len(images)]
        np.stack([image.pixels for image in images], out=rows.numpy())
        return rows
