"""Continuous batching: what the device does next.

    waiting images --encode--> ready jobs --prefill--> running texts --decode--> results

Running texts occupy the first slots. One `step` encodes at most one batch of images itself, fills free slots
from the ready queue, appends one token to every running text and retires those that are complete. The
scheduler is driven by one thread and knows no locks.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blip2_actor.engine.encode_worker import EncodeWorker
from blip2_actor.engine.model_runner import ModelRunner
from blip2_actor.engine.out_of_memory import OutOfMemory, catch_out_of_memory
from blip2_actor.engine.request_state import EncodedImage, RequestState
from blip2_actor.generation.beam_search import BeamSearch
from blip2_actor.generation.search import TextSearch
from blip2_actor.generation.step import advance
from blip2_actor.request import Result
from blip2_actor.status import Status
from blip2_actor.transfer import to_device

logger = logging.getLogger(__name__)

MIN_FILLED = 4
"""Free slots that are worth a prefill, and an eighth of all where there are many."""


@dataclass
class Counters:
    """What `EngineStats` reports."""

    num_encode_calls: int = 0
    num_images_encoded: int = 0
    num_decode_steps: int = 0
    num_tokens: int = 0
    num_finished: int = 0


@dataclass(eq=False)
class RunningText:
    """A search and where it lives."""

    job: RequestState
    search: TextSearch | BeamSearch
    slots: list[int]
    prefix_length: int
    """Cached positions that all its slots share."""
    length: int
    """Cached positions now."""


class Scheduler:
    """The queues, the slots and the step."""

    def __init__(
        self,
        runner: ModelRunner,
        max_slots: int,
        encode_batch: int,
        encode_worker: EncodeWorker | None = None,
    ) -> None:
        """
        Args:
            lane: encodes beside this thread; None leaves all of it to this one.
        """
        self.runner = runner
        self.encode_worker = encode_worker
        self.max_slots = max_slots
        self.encode_batch = encode_batch
        self.prefill_batch = max_slots
        self.waiting: deque[EncodedImage] = deque()
        self.ready: deque[RequestState] = deque()
        self.running: list[RunningText] = []
        self.owners: list[RunningText | None] = [None] * max_slots
        self.counters = Counters()

    def add(self, job: RequestState) -> None:
        """Queue a job; an image that is already encoded is not encoded again."""
        image = job.image
        if image.is_encoded:
            self._make_ready(job)
            return
        if not image.jobs:
            self.waiting.append(image)
        image.jobs.append(job)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.ready or self.running or self._num_in_encode_worker)

    @property
    def can_step(self) -> bool:
        """True where a step would do something: not while only the lane works."""
        return bool(
            self.waiting or self.ready or self.running or (self.encode_worker and self.encode_worker.is_done)
        )

    @property
    def num_waiting(self) -> int:
        """Images not yet encoded and jobs without a slot; safe to ask from any thread."""
        return len(self.waiting) + self._num_in_encode_worker + len(self.ready)

    @property
    def _num_in_encode_worker(self) -> int:
        return self.encode_worker.num_images if self.encode_worker else 0

    @property
    def num_running(self) -> int:
        return sum(owner is not None for owner in self.owners)

    def step(self) -> None:
        """What the device is given is queued there without waiting: a batch of images, the prefill of earlier
        ones, a decode step. The host waits only for chosen tokens, of which it needs one small tensor."""
        self._drop_cancelled()
        for stage in (self._encode, self._fill_slots, self._decode):
            found = catch_out_of_memory(stage)
            if isinstance(found, OutOfMemory):
                self._shrink(found)

    def _drop_cancelled(self) -> None:
        cancelled = [text for text in self.running if text.job.is_dropped()]
        if cancelled:
            self._retire(cancelled)

    # Encoding -------------------------------------------------------------------------------------------

    def _encode(self) -> None:
        """Encode while the ready queue does not cover the free slots; a lane goes on until it covers all.

        A batch that is not full waits as long as there is something else to do.
        """
        encode_worker = self.encode_worker
        while encode_worker is not None and encode_worker.is_done:
            self._encoded(*encode_worker.take())
        num_missing = self.max_slots - self.num_running - sum(job.num_slots for job in self.ready)
        # Where this thread encodes too, the last images go to both at once.
        share = len(self.waiting) // 2 if num_missing > 0 else len(self.waiting)
        while (
            encode_worker is not None
            and encode_worker.has_room
            and (num_missing > -self.max_slots or self._is_overdue)
        ):
            images = self._next_images(share)
            if not images:
                break
            share -= len(images)
            encode_worker.give(images)
        if num_missing <= 0 and not (encode_worker is None and self._is_overdue):
            return
        if images := self._next_images(self.encode_batch):
            self._encoded(images, catch_out_of_memory(lambda: self.runner.encode(images)))

    def _encoded(self, images: list[EncodedImage], out_of_memory: OutOfMemory | None) -> None:
        """A batch comes from the encoders, or back to the queue."""
        if out_of_memory is not None:
            self.waiting.extendleft(reversed(images))
            if len(images) <= self.encode_batch:  # larger ones were begun before
                self._encode_less(out_of_memory)
            return
        self.counters.num_encode_calls += 1
        self.counters.num_images_encoded += len(images)
        for image in images:
            if not image.is_encoded:  # more is wanted of it than when its pass began
                self.waiting.append(image)
                continue
            for job in image.jobs:
                self._make_ready(job)
            image.jobs.clear()

    def _make_ready(self, job: RequestState) -> None:
        """Queue for a slot; who only wanted the image encoded is served, who needs more slots than memory
        holds never can be."""
        if not job.searches:
            job.finish()
        elif job.num_slots > self.max_slots:
            error = (
                f"out of memory: num_beams and num_return_sequences must be at most {self.max_slots}, got "
                f"{job.num_slots}; lower them, or give the engine more memory"
            )
            job.resolve(Result(status=Status.FAILED, error=error))
        else:
            self.ready.append(job)

    def _next_images(self, most: int) -> list[EncodedImage]:
        """Take a batch of waiting images; none while it would not be full and older texts are ready."""
        if len(self.waiting) < self.encode_batch and self.ready and not self._is_overdue:
            return []
        images: list[EncodedImage] = []
        while self.waiting and len(images) < min(most, self.encode_batch):
            image = self.waiting.popleft()
            image.jobs = [job for job in image.jobs if not job.is_dropped()]
            if image.jobs:
                images.append(image)
        return images

    @property
    def _is_overdue(self) -> bool:
        """True where an image waits that came before every ready text: those of encoded images pass it by."""
        return bool(self.waiting and self.ready and self.waiting[0].jobs[0].number < self.ready[0].number)

    # Filling slots --------------------------------------------------------------------------------------

    def _fill_slots(self) -> None:
        """Prefill the ready jobs that fit, in order of arrival, and take their first tokens.

        A prefill costs as much as a decode step even for one text, so a few free slots are awaited.
        """
        free = [slot for slot, owner in enumerate(self.owners) if owner is None]
        wanted = sum(job.num_slots for job in self.ready)
        if self.running and len(free) < min(wanted, max(MIN_FILLED, self.max_slots // 8)):
            return
        jobs: list[RequestState] = []
        while self.ready and (self.ready[0].is_dropped() or self.ready[0].num_slots <= len(free)):
            if len(jobs) == self.prefill_batch:
                break
            job = self.ready.popleft()
            if job.is_dropped():
                continue
            jobs.append(job)
            for search in job.searches:
                self._place(job, search, [free.pop(0) for _ in range(search.num_slots)])
        if not jobs:
            return
        texts = self.running[-sum(len(job.searches) for job in jobs) :]
        first_slot = {id(text.job): text.slots[0] for text in reversed(texts)}
        logits = catch_out_of_memory(lambda: self.runner.prefill(jobs, [first_slot[id(job)] for job in jobs]))
        if isinstance(logits, OutOfMemory):
            self._restart(jobs)
            self._prefill_less(len(jobs), logits)
            return
        source = {id(job): row for row, job in enumerate(jobs)}
        self._share_prefixes(texts, first_slot)
        rows = [source[id(text.job)] for text in texts for _ in text.slots]
        if len(rows) > len(jobs):
            logits = logits[to_device(rows, logits.device)]
        self._take_tokens(logits, texts)

    def _place(self, job: RequestState, search: TextSearch | BeamSearch, slots: list[int]) -> None:
        prefix_length = self.runner.cached_length(job)
        text = RunningText(job, search, slots, prefix_length, prefix_length)
        self.running.append(text)
        for slot in slots:
            self.owners[slot] = text

    def _share_prefixes(self, texts: list[RunningText], first_slot: dict[int, int]) -> None:
        """Copy a job's prefix to its other slots: beams and samples start from the same image."""
        pairs = [
            (first_slot[id(text.job)], slot, text.length)
            for text in texts
            for slot in text.slots
            if slot != first_slot[id(text.job)]
        ]
        if pairs:
            sources, targets, lengths = (list(column) for column in zip(*pairs, strict=True))
            self.runner.copy_slots(sources, targets, max(lengths))

    # Decoding -------------------------------------------------------------------------------------------

    def _decode(self) -> None:
        """Append the last token of every running text to its slot, and choose the next."""
        if not self.running:
            return
        self._close_holes()
        token_ids, lengths = [0] * self.num_running, [0] * self.num_running
        for text in self.running:
            for slot, token_id in zip(text.slots, text.search.tokens(), strict=True):
                token_ids[slot], lengths[slot] = token_id, text.length
        logits = self.runner.decode(token_ids, lengths)
        self.runner.send_ahead(self.waiting, self.encode_batch)
        for text in self.running:
            text.length += 1
        self.counters.num_decode_steps += 1
        order = [slot for text in self.running for slot in text.slots]
        self._take_tokens(logits, self.running, order)

    def _take_tokens(self, logits: Tensor, texts: list[RunningText], order: list[int] | None = None) -> None:
        """Let each text take its step.

        Args:
            logits: float[rows, V]; the texts' slots one after the other, or wherever `order` says.
        """
        rows = iter(order if order is not None else range(logits.shape[0]))
        searches = [(text.search, [next(rows) for _ in text.slots]) for text in texts]
        parents = advance(logits, searches)
        self.counters.num_tokens += len(texts)
        self._reorder_beams(texts, parents)
        done = [text for text in texts if text.search.done]
        if done:
            self._retire(done)

    def _reorder_beams(self, texts: list[RunningText], parents: list[list[int] | None]) -> None:
        sources, targets, starts, stops = [], [], [], []
        for text, found in zip(texts, parents, strict=True):
            if found is None or text.search.done or text.length == text.prefix_length:
                continue
            for slot, parent in zip(text.slots, found, strict=True):
                if text.slots[parent] != slot:
                    sources.append(text.slots[parent])
                    targets.append(slot)
                    starts.append(text.prefix_length)
                    stops.append(text.length)
        if sources:
            self.runner.copy_positions(sources, targets, min(starts), max(stops))

    def _retire(self, texts: list[RunningText]) -> None:
        """Free the slots of finished or cancelled texts, and deliver jobs that are complete."""
        gone = set(map(id, texts))
        for text in texts:
            for slot in text.slots:
                self.owners[slot] = None
        self.running = [text for text in self.running if id(text) not in gone]
        for job in dict.fromkeys(text.job for text in texts):
            if not job.is_dropped() and all(search.done for search in job.searches):
                job.finish()
                self.counters.num_finished += 1

    def _close_holes(self) -> None:
        """Move texts from the last slots into free ones, so that running slots are the first ones."""
        count = self.num_running
        holes = [slot for slot in range(count) if self.owners[slot] is None]
        if not holes:
            return
        movers = [slot for slot in range(count, self.max_slots) if self.owners[slot] is not None]
        for source, target in zip(movers, holes, strict=True):
            text = self.owners[source]
            assert text is not None  # by the choice of movers
            text.slots[text.slots.index(source)] = target
            self.owners[source], self.owners[target] = None, text
        longest = max(text.length for text in self.running)
        self.runner.copy_slots(movers, holes, longest)

    # Out of memory --------------------------------------------------------------------------------------

    def _encode_less(self, out_of_memory: OutOfMemory) -> None:
        if self.encode_batch == 1 and self.max_slots == 1:
            image = self.waiting.popleft()
            _fail(image.jobs, out_of_memory)
            image.jobs.clear()
            return
        if self.encode_batch == 1:
            self._shrink(out_of_memory)
            return
        self.encode_batch //= 2
        logger.warning("Out of memory: images are encoded %d at a time from now on", self.encode_batch)

    def _prefill_less(self, num_jobs: int, out_of_memory: OutOfMemory) -> None:
        if num_jobs == 1 and self.max_slots == 1:
            _fail([self.ready.popleft()], out_of_memory)
            return
        if num_jobs == 1:
            self._shrink(out_of_memory)
            return
        self.prefill_batch = num_jobs // 2
        logger.warning("Out of memory: prompts are read %d at a time from now on", self.prefill_batch)

    def _shrink(self, out_of_memory: OutOfMemory) -> None:
        """Go on with half the slots; all texts begin again, for there is no memory to move them in. The text
        of a last slot fails alone.

        Raises:
            OutOfMemoryError: there is only one slot, and no text in it.
        """
        if self.max_slots == 1 and self.running:
            jobs = [text.job for text in self.running]
            self._retire(self.running)
            self.runner.shrink(1)
            _fail(jobs, out_of_memory)
            return
        if self.max_slots == 1:
            raise torch.OutOfMemoryError(out_of_memory.reason)
        self.max_slots //= 2
        logger.warning("Out of memory: %d texts are decoded at once from now on", self.max_slots)
        self._restart(list(dict.fromkeys(text.job for text in self.running)))
        del self.owners[self.max_slots :]
        self.runner.shrink(self.max_slots)
        self.prefill_batch = self.max_slots  # what failed may have been the slots' growth
        ready, self.ready = self.ready, deque()
        for job in ready:
            self._make_ready(job)

    def _restart(self, jobs: list[RequestState]) -> None:
        """Take jobs out of their slots and put them in front of the ready queue."""
        gone = set(map(id, jobs))
        for text in [text for text in self.running if id(text.job) in gone]:
            self.running.remove(text)
            for slot in text.slots:
                self.owners[slot] = None
        for job in jobs:
            job.restart()
        self.ready.extendleft(reversed(jobs))


def _fail(jobs: Sequence[RequestState], out_of_memory: OutOfMemory) -> None:
    """They do not fit even alone."""
    for job in jobs:
        if not job.future.done():
            job.resolve(Result(status=Status.FAILED, error=f"out of memory: {out_of_memory.reason}"))
