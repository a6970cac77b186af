"""A second stream of a GPU that encodes images, next to the decode steps.

The device always has a batch of images to work on: while the host selects tokens, and while a decode step
waits for memory more than it computes. The decode steps go first, because their stream has a higher priority
(`prepare_device`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.encoders import Encoded
from blip2_actor.engine.model_runner import ModelRunner
from blip2_actor.engine.out_of_memory import OutOfMemory, catch_out_of_memory


@dataclass(frozen=True)
class _Batch:
    images: list[EncodedImage]
    encoded: Encoded | OutOfMemory
    """The tensors that are being computed; memory is short when the work is queued, not later."""
    event: torch.cuda.Event | None
    """Passed when the device has encoded the batch; None on a CPU."""


class EncodeStream:
    """Queues batches on the device: `give` it one, and `take` them back in order.

    One thread, the engine's, calls all methods. It also works on a CPU, without gain.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self.num_images = 0
        """Images given and not yet taken back."""
        self._runner = runner
        self._batches: deque[_Batch] = deque()
        self._stream = torch.cuda.Stream(runner.device) if runner.device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(runner.device))  # which has loaded the weights

    @property
    def has_room(self) -> bool:
        """True while it has at most one batch: with a second one the stream never waits for its next."""
        return len(self._batches) < 2

    @property
    def is_done(self) -> bool:
        """True if `take` would not wait."""
        return bool(self._batches) and (self._batches[0].event is None or self._batches[0].event.query())

    def give(self, images: list[EncodedImage]) -> None:
        """Queue a batch; the host does not wait for the device."""
        with torch.cuda.stream(self._stream):  # None changes nothing
            encoded = catch_out_of_memory(lambda: self._runner.run_encoders(images))
        event = None
        if self._stream is not None:
            event = torch.cuda.Event()
            event.record(self._stream)
        self._batches.append(_Batch(images, encoded, event))
        self.num_images += len(images)

    def take(self) -> tuple[list[EncodedImage], OutOfMemory | None]:
        """Wait for the first batch and return its images, which are encoded unless memory did not suffice."""
        batch = self._batches.popleft()
        self.num_images -= len(batch.images)
        if batch.event is not None:
            batch.event.synchronize()
        if isinstance(batch.encoded, OutOfMemory):
            return batch.images, batch.encoded
        if self._stream is not None:
            # This stream reads the tensors from now on. Otherwise their memory could be given to the next
            # batch while it still reads.
            for tensor in batch.encoded:
                tensor.record_stream(torch.cuda.current_stream())
        encoded = batch.encoded
        return batch.images, catch_out_of_memory(lambda: self._runner.store(batch.images, encoded))
