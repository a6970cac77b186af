"""Continuous batching: what the device does next.

    waiting images --encode--> ready requests --prefill--> running texts --decode--> results

One `step` encodes at most one batch of images on this thread, fills free slots from the ready queue, appends
one token to every running text, and retires the texts that are complete. One thread drives the scheduler, so
there are no locks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from blip2_actor.engine.encode_worker import EncodeWorker
from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.memory_recovery import MemoryRecovery
from blip2_actor.engine.model_runner import ModelRunner
from blip2_actor.engine.out_of_memory import Limits, OutOfMemory, catch_out_of_memory
from blip2_actor.engine.request_queues import EncodeQueue, ReadyQueue
from blip2_actor.engine.request_state import RequestState
from blip2_actor.engine.slot_table import RunningText, SlotTable
from blip2_actor.generation.step import advance
from blip2_actor.transfer import to_device

MIN_FREE_SLOTS = 4
"""Free slots that are worth a prefill; an eighth of all slots if that is more."""


@dataclass
class Counters:
    """What `EngineStats` reports."""

    num_encode_calls: int = 0
    num_images_encoded: int = 0
    num_decode_steps: int = 0
    num_tokens: int = 0
    num_finished: int = 0


class Scheduler:
    """The queues, the slots, and the step that moves requests from one to the next."""

    def __init__(
        self,
        runner: ModelRunner,
        max_slots: int,
        encode_batch: int,
        encode_worker: EncodeWorker | None = None,
    ) -> None:
        """
        Args:
            max_slots: texts decoded at once.
            encode_batch: images per pass of the encoders.
            encode_worker: a second thread that encodes; None encodes everything on this thread.
        """
        self.runner = runner
        self.encode_worker = encode_worker
        self.limits = Limits(max_slots, encode_batch)
        self.waiting = EncodeQueue()
        self.ready = ReadyQueue(self.limits)
        self.slots = SlotTable(max_slots)
        self.counters = Counters()
        self._recovery = MemoryRecovery(runner, self.limits, self.waiting, self.ready, self.slots)
        self._num_arrived = 0

    def add(self, request: RequestState) -> None:
        """Queue a request; an image that is already encoded is not encoded again."""
        request.arrival = self._num_arrived
        self._num_arrived += 1
        if request.image.is_encoded:
            self.ready.add(request)
        else:
            self.waiting.add(request)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.ready or self.slots.texts or self._num_in_encode_worker)

    @property
    def can_step(self) -> bool:
        """True if a step would do something; False while only the encode worker is busy."""
        is_encoded = self.encode_worker is not None and self.encode_worker.is_done
        return bool(self.waiting or self.ready or self.slots.texts or is_encoded)

    @property
    def num_waiting(self) -> int:
        """Images not yet encoded and requests without a slot; safe to read from any thread."""
        return len(self.waiting) + self._num_in_encode_worker + len(self.ready)

    @property
    def num_running(self) -> int:
        """Slots in use; safe to read from any thread."""
        return self.slots.num_used

    @property
    def _num_in_encode_worker(self) -> int:
        return self.encode_worker.num_images if self.encode_worker else 0

    def step(self) -> None:
        """Queue work on the device: a batch of images, the prefill of earlier ones, a decode step.

        The host does not wait for the device, except for the selected tokens, which are one small tensor.
        """
        self._drop_cancelled()
        for stage in (self._encode, self._fill_slots, self._decode):
            outcome = catch_out_of_memory(stage)
            if isinstance(outcome, OutOfMemory):
                self._recovery.after_step(outcome)

    def _drop_cancelled(self) -> None:
        cancelled = [text for text in self.slots.texts if text.request.is_dropped()]
        if cancelled:
            self._retire(cancelled)

    # Encoding -------------------------------------------------------------------------------------------

    def _encode(self) -> None:
        """Encode a batch on this thread while the ready requests do not cover the free slots."""
        if self.encode_worker is not None:
            self._use_encode_worker(self.encode_worker)
        is_behind = self._num_uncovered_slots > 0
        is_alone_and_overdue = self.encode_worker is None and self._is_overdue
        if not is_behind and not is_alone_and_overdue:
            return
        if images := self._next_images(self.limits.encode_batch):
            self._encoded(images, catch_out_of_memory(lambda: self.runner.encode(images)))

    def _use_encode_worker(self, encode_worker: EncodeWorker) -> None:
        """Take the finished batches, and give new ones.

        The worker goes on until enough requests are ready to fill all slots once more.
        """
        while encode_worker.is_done:
            self._encoded(*encode_worker.take())
        num_uncovered = self._num_uncovered_slots
        this_thread_encodes_too = num_uncovered > 0
        # If both threads encode, divide the last images between them, so that neither is idle.
        max_images = len(self.waiting) // 2 if this_thread_encodes_too else len(self.waiting)
        is_short = num_uncovered > -self.limits.max_slots
        while encode_worker.has_room and (is_short or self._is_overdue):
            images = self._next_images(max_images)
            if not images:
                return
            max_images -= len(images)
            encode_worker.give(images)

    @property
    def _num_uncovered_slots(self) -> int:
        """Free slots for which no request is ready; negative if more requests are ready than slots are
        free."""
        return self.slots.num_free - self.ready.num_slots

    @property
    def _is_overdue(self) -> bool:
        """True if an image waits that came before every ready request.

        Requests for images that are encoded already overtake it; they must not do so without end.
        """
        return bool(self.waiting and self.ready) and self.waiting.first_arrival < self.ready.first_arrival

    def _next_images(self, max_images: int) -> list[EncodedImage]:
        """Take a batch of waiting images; none while it would not be full and older requests are ready."""
        encode_batch = self.limits.encode_batch
        if len(self.waiting) < encode_batch and self.ready and not self._is_overdue:
            return []
        return self.waiting.take(min(max_images, encode_batch))

    def _encoded(self, images: list[EncodedImage], out_of_memory: OutOfMemory | None) -> None:
        """Make the requests of a finished batch ready, or recover from a batch that did not fit."""
        if out_of_memory is not None:
            self._recovery.after_encode(images, out_of_memory)
            return
        self.counters.num_encode_calls += 1
        self.counters.num_images_encoded += len(images)
        for image in images:
            if not image.is_encoded:  # more of it is wanted than when its pass began
                self.waiting.put_behind(image)
                continue
            for request in self.waiting.take_requests(image):
                self.ready.add(request)

    # Filling slots --------------------------------------------------------------------------------------

    def _fill_slots(self) -> None:
        """Prefill the ready requests that fit, in order of arrival, and take their first tokens."""
        if not self._is_worth_a_prefill:
            return
        requests = self.ready.take(self.slots.num_free, self.limits.prefill_batch)
        if not requests:
            return
        groups = [self._place(request) for request in requests]
        first_slots = [texts[0].slots[0] for texts in groups]
        logits = catch_out_of_memory(lambda: self.runner.prefill(requests, first_slots))
        if isinstance(logits, OutOfMemory):
            self._recovery.after_prefill(requests, logits)
            return
        self._share_prefixes(groups)
        # A request has one row of logits, and all its slots start from it.
        rows = [row for row, texts in enumerate(groups) for text in texts for _ in text.slots]
        if len(rows) > len(requests):
            logits = logits[to_device(rows, logits.device)]
        placed = [text for texts in groups for text in texts]
        row = iter(range(len(rows)))
        self._take_tokens(logits, placed, [[next(row) for _ in text.slots] for text in placed])

    @property
    def _is_worth_a_prefill(self) -> bool:
        """A prefill of one text costs as much as a decode step, so wait until a few slots are free."""
        if not self.slots.texts:
            return True
        min_free = max(MIN_FREE_SLOTS, self.limits.max_slots // 8)
        return self.slots.num_free >= min(self.ready.num_slots, min_free)

    def _place(self, request: RequestState) -> list[RunningText]:
        prefix_length = self.runner.cached_length(request)
        return [self.slots.place(request, search, prefix_length) for search in request.searches]

    def _share_prefixes(self, groups: Sequence[list[RunningText]]) -> None:
        """Copy each request's prefix to its other slots: its beams and samples start from the same image."""
        sources: list[int] = []
        targets: list[int] = []
        length = 0
        for texts in groups:
            first, *others = [slot for text in texts for slot in text.slots]
            if others:
                sources += [first] * len(others)
                targets += others
                length = max(length, texts[0].length)
        if sources:
            self.runner.copy_slots(sources, targets, length)

    # Decoding -------------------------------------------------------------------------------------------

    def _decode(self) -> None:
        """Append the last token of every running text to its slots, and select the next one."""
        texts = self.slots.texts
        if not texts:
            return
        self._close_gaps()
        token_ids, lengths = [0] * self.num_running, [0] * self.num_running
        for text in texts:
            for slot, token_id in zip(text.slots, text.search.tokens(), strict=True):
                token_ids[slot], lengths[slot] = token_id, text.length
        logits = self.runner.decode(token_ids, lengths)
        self.runner.upload_ahead(self.waiting.first_batch(self.limits.encode_batch))
        for text in texts:
            text.length += 1
        self.counters.num_decode_steps += 1
        self._take_tokens(logits, texts, [text.slots for text in texts])

    def _close_gaps(self) -> None:
        """Move texts from the last slots into free ones, so that the running slots are the first ones."""
        sources, targets = self.slots.close_gaps()
        if sources:
            self.runner.copy_slots(sources, targets, max(text.length for text in self.slots.texts))

    def _take_tokens(self, logits: Tensor, texts: Sequence[RunningText], rows: Sequence[list[int]]) -> None:
        """Let every text select its next token.

        Args:
            logits: float[rows, V].
            rows: of each text, those of its slots.
        """
        parents = advance(logits, [(text.search, of_text) for text, of_text in zip(texts, rows, strict=True)])
        self.counters.num_tokens += len(texts)
        self._reorder_beams(texts, parents)
        finished = [text for text in texts if text.search.done]
        if finished:
            self._retire(finished)

    def _reorder_beams(self, texts: Sequence[RunningText], parents: list[list[int] | None]) -> None:
        """Copy generated positions between the slots of a beam search, as far as beams changed places."""
        sources, targets, starts, stops = [], [], [], []
        for text, parents_of_text in zip(texts, parents, strict=True):
            if parents_of_text is None or text.search.done or text.length == text.prefix_length:
                continue
            for slot, parent in zip(text.slots, parents_of_text, strict=True):
                if text.slots[parent] != slot:
                    sources.append(text.slots[parent])
                    targets.append(slot)
                    starts.append(text.prefix_length)
                    stops.append(text.length)
        if sources:
            self.runner.copy_positions(sources, targets, min(starts), max(stops))

    def _retire(self, texts: Sequence[RunningText]) -> None:
        """Free the slots of finished or cancelled texts, and deliver the requests that are complete."""
        self.slots.free(texts)
        for request in dict.fromkeys(text.request for text in texts):
            if not request.is_dropped() and all(search.done for search in request.searches):
                request.finish()
                self.counters.num_finished += 1
