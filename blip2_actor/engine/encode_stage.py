"""Which images are encoded next, on which thread or stream, and for whom.

Images of normal priority go first, and while texts run, they wait a little for each other: every text has to
wait for a pass of the encoders and for the prefill after it, which may take as long for one image as for
several. Images of low priority are encoded for slots that no other request wants.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from blip2_actor.engine.encode_stream import EncodeStream
from blip2_actor.engine.encode_worker import EncodeWorker
from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.memory_recovery import MemoryRecovery
from blip2_actor.engine.model_runner import ModelRunner
from blip2_actor.engine.out_of_memory import Limits, OutOfMemory, catch_out_of_memory
from blip2_actor.engine.request_queues import Lane, Lanes
from blip2_actor.engine.slot_table import SlotTable

GATHER_S = 0.02
"""How long an image of normal priority waits for others while texts run. A device whose passes take the same
time for any number of images answers callers at 30 % of its speed after 0.172 s instead of 0.25, and gives a
batch job next to them 48 instead of 23 % of its speed (2026-11-27, `benchmarks.behind`)."""
COMPANY_S = 2 * GATHER_S
"""An image waits only if it came this soon after another: the images of a caller who sends one after the
other would wait in vain. With half of this, the job of that device keeps 43 instead of 48 % of its speed."""


class EncodeStage:
    """Takes images from the lanes, a batch at a time, and makes their requests ready."""

    def __init__(
        self,
        runner: ModelRunner,
        limits: Limits,
        lanes: Lanes,
        slots: SlotTable,
        recovery: MemoryRecovery,
        ahead: EncodeWorker | EncodeStream | None,
    ) -> None:
        """
        Args:
            ahead: a second thread or stream that encodes; None encodes everything in `step` itself.
        """
        self.num_calls = 0
        """Passes through the encoders."""
        self.num_images = 0
        """Images encoded."""
        self.clock_s: Callable[[], float] = time.monotonic
        """The clock of `RequestState.arrived_s`; tests replace it."""
        self._runner = runner
        self._limits = limits
        self._lanes = lanes
        self._slots = slots
        self._recovery = recovery
        self._worker = ahead if isinstance(ahead, EncodeWorker) else None
        self._stream = ahead if isinstance(ahead, EncodeStream) else None

    @property
    def num_ahead(self) -> int:
        """Images that the second thread or stream has; safe to read from any thread."""
        ahead = self._worker or self._stream
        return ahead.num_images if ahead else 0

    @property
    def has_batch_to_take(self) -> bool:
        """True if `step` would take a batch: one that the second thread has finished, or any of a stream."""
        return self._worker.is_done if self._worker else self.num_ahead > 0

    def step(self) -> None:
        """Encode a batch on this thread while the ready requests do not cover the free slots.

        With a stream, encode ahead instead.
        """
        if self._stream is not None:
            self._use_stream(self._stream)
            return
        if self._worker is not None:
            self._use_worker(self._worker)
        for lane in self._lanes:
            is_behind = self._num_uncovered_slots(lane) > 0
            is_alone_and_overdue = self._worker is None and lane.is_overdue
            if not is_behind and not is_alone_and_overdue:
                continue
            if images := self._next_images(lane, self._limits.encode_batch):
                self.finish(images, catch_out_of_memory(partial(self._runner.encode, images)))
                return

    def finish(self, images: list[EncodedImage], out_of_memory: OutOfMemory | None) -> None:
        """Make the requests of a finished batch ready, or recover from a batch that did not fit."""
        if out_of_memory is not None:
            self._recovery.after_encode(images, out_of_memory)
            return
        self.num_calls += 1
        self.num_images += len(images)
        for image in images:
            is_encoded = image.is_encoded  # False if more of it is wanted than when its pass began
            for lane in self._lanes:
                if not is_encoded:
                    lane.waiting.put_behind(image)
                    continue
                for request in lane.waiting.take_requests(image):
                    lane.ready.add(request)

    def _use_stream(self, stream: EncodeStream) -> None:
        """Take the encoded batches, and queue new ones, about a batch more than free slots need.

        While there are too few requests for the free slots, each step waits for one batch. So steps with few
        texts, which cost nearly as much as those with many, do not run ahead of the encoders.
        """
        while stream.is_done:
            self.finish(*stream.take())
        if stream.num_images and self._is_behind:
            self.finish(*stream.take())
        for lane in self._lanes:
            is_short = self._num_uncovered_slots(lane) > -self._limits.encode_batch
            while stream.has_room and (is_short or lane.is_overdue):
                images = self._next_images(lane, self._limits.encode_batch)
                if not images:
                    break
                stream.give(images)

    @property
    def _is_behind(self) -> bool:
        return any(self._num_uncovered_slots(lane) > 0 for lane in self._lanes)

    def _use_worker(self, worker: EncodeWorker) -> None:
        """Take the finished batches, and give new ones.

        The worker goes on until enough requests are ready to fill all slots once more.
        """
        while worker.is_done:
            self.finish(*worker.take())
        for lane in self._lanes:
            num_uncovered = self._num_uncovered_slots(lane)
            this_thread_encodes_too = num_uncovered > 0
            # If both threads encode, divide the last images between them, so that neither is idle.
            max_images = len(lane.waiting) // 2 if this_thread_encodes_too else len(lane.waiting)
            is_short = num_uncovered > -self._limits.max_slots
            while worker.has_room and (is_short or lane.is_overdue):
                images = self._next_images(lane, max_images)
                if not images:
                    break
                max_images -= len(images)
                worker.give(images)

    def _num_uncovered_slots(self, lane: Lane) -> int:
        """Return how many slots a lane could have, minus those that ready requests will take.

        For requests of normal priority, slots of texts of low priority count as free.
        """
        normal, low = self._lanes
        num_left = self._slots.num_free - normal.ready.num_slots
        return num_left - low.ready.num_slots if lane is low else num_left + self._slots.num_low_priority

    def _next_images(self, lane: Lane, max_images: int) -> list[EncodedImage]:
        """Take a batch of waiting images; none while it would not be full and older requests are ready.

        If a batch of normal priority would not be full, it waits for `GATHER_S`. It is then filled with
        images of low priority, but only as many as could get slots at once: more would make the others wait.
        """
        encode_batch = self._limits.encode_batch
        if len(lane.waiting) < encode_batch and lane.ready and not lane.is_overdue:
            return []
        low = self._lanes.low
        if lane is not low and len(lane.waiting) < encode_batch and self._is_gathering:
            return []
        size = min(max_images, encode_batch)
        images = lane.waiting.take(size)
        if images and lane is not low:
            num_left = self._num_uncovered_slots(low) - len(images)
            more = low.waiting.take(min(num_left, size - len(images)))
            images += [image for image in more if image not in lane.waiting]
        return images

    @property
    def _is_gathering(self) -> bool:
        """True while images of normal priority wait for each other, so that texts wait less often."""
        waiting = self._lanes.normal.waiting
        if not (self._slots.texts and waiting) or waiting.gap_s > COMPANY_S:
            return False
        return self.clock_s() - waiting.first_arrived_s < GATHER_S
