"""What the scheduler does when the device runs out of memory.

It halves what it does at once and tries again. In this order: the encode batch or the prefill batch; then the
slots, which gives their memory back but restarts all running texts; and when one image, one prompt or one
text alone does not fit, its requests fail and the others go on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.model_runner import ModelRunner
from blip2_actor.engine.out_of_memory import Limits, OutOfMemory
from blip2_actor.engine.request_queues import Lanes
from blip2_actor.engine.request_state import RequestState
from blip2_actor.engine.slot_table import SlotTable
from blip2_actor.request import Result
from blip2_actor.status import Status


class MemoryRecovery:
    """Puts failed work back into the scheduler's queues, and lowers the limits."""

    def __init__(self, runner: ModelRunner, limits: Limits, lanes: Lanes, slots: SlotTable) -> None:
        self._runner = runner
        self._limits = limits
        self._lanes = lanes
        self._slots = slots

    def after_encode(self, images: list[EncodedImage], out_of_memory: OutOfMemory) -> None:
        """Queue the images again, and encode fewer at once.

        An image of two priorities may be in another batch too, which has served all its requests.
        """
        images = [image for image in images if any(image in lane.waiting for lane in self._lanes)]
        if not images:
            return
        for lane in self._lanes:
            lane.waiting.put_back(images)
        if len(images) > self._limits.encode_batch:
            return  # this pass began before the batch was halved for another one
        if self._limits.halve_encode_batch():
            self._runner.forget_images()
            return
        if self._limits.max_slots > 1:
            self.after_step(out_of_memory)
        else:
            for lane in self._lanes:
                _fail(lane.waiting.take_requests(images[0]), out_of_memory)

    def after_prefill(self, requests: list[RequestState], out_of_memory: OutOfMemory) -> None:
        """Take the requests out of their slots, and prefill fewer at once."""
        self.restart(requests)
        if self._limits.halve_prefill_batch(len(requests)):
            return
        if self._limits.max_slots > 1:
            self.after_step(out_of_memory)
        else:
            _fail([self._lanes.of(requests[0]).ready.take_first()], out_of_memory)

    def after_step(self, out_of_memory: OutOfMemory) -> None:
        """Go on with half the slots. All texts start again, because there is no memory to move them in.

        The text in a last slot fails alone.

        Raises:
            OutOfMemoryError: there is only one slot, and no text in it.
        """
        requests = self._slots.requests
        if self._limits.halve_slots():
            self.restart(requests)
            self._slots.shrink(self._limits.max_slots)
            self._runner.shrink(self._limits.max_slots)
            for lane in self._lanes:
                lane.ready.check_again()
        elif requests:
            self._slots.free(self._slots.texts)
            self._runner.shrink(1)
            _fail(requests, out_of_memory)
        else:
            raise torch.OutOfMemoryError(out_of_memory.reason)

    def restart(self, requests: list[RequestState]) -> None:
        """Take requests out of their slots, and put them in front of the ready queue of their lane."""
        restarting = set(requests)
        self._slots.free([text for text in self._slots.texts if text.request in restarting])
        for request in requests:
            request.restart()
        for lane in self._lanes:
            lane.ready.put_back([request for request in requests if self._lanes.of(request) is lane])


def _fail(requests: Sequence[RequestState], out_of_memory: OutOfMemory) -> None:
    """End requests that do not fit even alone."""
    for request in requests:
        if not request.is_dropped() and not request.future.done():
            request.resolve(Result(status=Status.FAILED, error=f"out of memory: {out_of_memory.reason}"))
