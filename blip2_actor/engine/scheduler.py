"""Continuous batching: what the device does next.

    waiting images --encode--> ready requests --prefill--> running texts --decode--> results

One `step` encodes at most one batch of images on this thread (on a GPU, it keeps two queued on a second
stream), fills free slots from the ready queue, appends one token to every running text, and retires complete
texts. On a CPU, texts of many slots sit out some steps (`step_shares`). One thread drives the scheduler, so
there are no locks.

A request of low priority takes only slots that no other request wants. When another one needs its slots, it
gives them up and begins again later; its tokens stay the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from blip2_actor.engine.encode_stage import EncodeStage
from blip2_actor.engine.encode_stream import EncodeStream
from blip2_actor.engine.encode_worker import EncodeWorker
from blip2_actor.engine.memory_recovery import MemoryRecovery
from blip2_actor.engine.model_runner import ON_DEVICE, ModelRunner
from blip2_actor.engine.out_of_memory import Limits, OutOfMemory, catch_out_of_memory
from blip2_actor.engine.request_queues import Lanes
from blip2_actor.engine.request_state import RequestState
from blip2_actor.engine.slot_table import RunningText, SlotTable
from blip2_actor.engine.step_shares import StepShares
from blip2_actor.engine.unread_tokens import UnreadTokens
from blip2_actor.generation.step import advance
from blip2_actor.request import Result
from blip2_actor.transfer import to_device

MIN_FREE_SLOTS = 4
"""Free slots that are worth a prefill; an eighth of all slots if that is more."""


@dataclass
class Counters:
    """The counters of texts in `EngineStats`."""

    num_decode_steps: int = 0
    num_tokens: int = 0
    num_finished: int = 0
    num_preempted: int = 0


class Scheduler:
    """The queues, the slots, and the step that moves requests from one to the next."""

    def __init__(
        self,
        runner: ModelRunner,
        max_slots: int,
        encode_batch: int,
        encode_ahead: EncodeWorker | EncodeStream | None = None,
        reads_late: bool = False,
        shares_steps: bool = False,
    ) -> None:
        """
        Args:
            max_slots: texts decoded at once.
            encode_batch: images per pass of the encoders.
            encode_ahead: a second thread or stream that encodes; None encodes everything in `step` itself.
            reads_late: read the tokens of a step after the next one is queued, if all texts take the largest
                logit.
            shares_steps: texts of many slots sit out steps while others run; see `StepShares`.
        """
        self.runner = runner
        self.limits = Limits(max_slots, encode_batch)
        self.lanes = Lanes(self.limits)
        self.slots = SlotTable(max_slots, shares_steps)
        self._shares = StepShares()
        self.counters = Counters()
        self._recovery = MemoryRecovery(runner, self.limits, self.lanes, self.slots)
        self.encoding = EncodeStage(runner, self.limits, self.lanes, self.slots, self._recovery, encode_ahead)
        self._reads_late = reads_late
        self._unread = UnreadTokens(runner)
        self._cancelled: deque[Future[Result]] = deque()
        """Futures that callers have cancelled since the last step. Asking each of 64 running texts instead
        takes 68 us a step (2026-11-26)."""
        self.note_cancelled = partial(_note_cancelled, self._cancelled)
        """A done callback for the future of each request, before those of the caller, which may raise."""

    def add(self, request: RequestState) -> None:
        """Queue a request; an image that is already encoded is not encoded again."""
        self.lanes.of(request).add(request)

    @property
    def has_work(self) -> bool:
        return bool(self.lanes or self.slots.texts or self._unread or self.encoding.num_ahead)

    @property
    def can_step(self) -> bool:
        """True if a step would do something; False while only the second thread of a CPU is busy."""
        return bool(self.lanes or self.slots.texts or self._unread or self.encoding.has_batch_to_take)

    @property
    def num_waiting(self) -> int:
        """Images not yet encoded and requests without a slot; safe to read from any thread."""
        return len(self.lanes) + self.encoding.num_ahead

    @property
    def num_running(self) -> int:
        """Slots in use; safe to read from any thread."""
        return self.slots.num_used

    def step(self) -> None:
        """Queue work on the device: a batch of images, the prefill of earlier ones, a decode step.

        The host waits for the device only for the selected tokens, which are one small tensor, and for images
        that free slots need. On a GPU, the tokens are those of the step before, so that the device has the
        next step while the host waits.
        """
        self._drop_cancelled()
        self._free_slots_of_last_tokens()
        for stage in (self.encoding.step, self._fill_slots, self._decode):
            outcome = catch_out_of_memory(stage)
            if isinstance(outcome, OutOfMemory):
                self._recovery.after_step(outcome)

    def _drop_cancelled(self) -> None:
        if not self._cancelled:
            return
        self._cancelled.clear()  # before looking: a later one comes with an entry of its own
        cancelled = [text for text in self.slots.texts if text.request.is_dropped()]
        if cancelled:
            self._retire(cancelled)

    def _free_slots_of_last_tokens(self) -> None:
        """Free the slots of texts whose last allowed token is selected."""
        if self._unread:
            self.slots.free([text for text in self.slots.texts if text.has_last_token])

    # Filling slots --------------------------------------------------------------------------------------

    def _fill_slots(self) -> None:
        """Prefill the ready requests that fit, in order of arrival, and take their first tokens."""
        if not self._is_worth_a_prefill:
            return
        normal, low = self.lanes
        max_requests = self.limits.prefill_batch
        requests = normal.ready.take(self.slots.num_free + self.slots.num_low_priority, max_requests)
        num_slots = sum(request.num_slots for request in requests)
        self._preempt(num_slots - self.slots.num_free)
        if not normal.ready:
            requests += low.ready.take(self.slots.num_free - num_slots, max_requests - len(requests))
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
        ready, num_free = self.lanes.low.ready, self.slots.num_free
        if self.lanes.normal.ready:
            ready, num_free = self.lanes.normal.ready, num_free + self.slots.num_low_priority
        min_free = max(MIN_FREE_SLOTS, self.limits.max_slots // 8)
        return num_free >= min(ready.num_slots, min_free)

    def _preempt(self, num_slots: int) -> None:
        """Take slots from the youngest texts of low priority; they have the least to lose."""
        requests = self.slots.youngest_of_low_priority(num_slots)
        if requests:
            self._recovery.restart(requests)
            self.counters.num_preempted += len(requests)

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
        """Append the last token of the running texts to their slots, and select the next one."""
        self._free_slots_of_last_tokens()  # of texts that the prefill has completed with one token
        if not self._reads_late or not all(text.takes_argmax for text in self.slots.texts):
            self._read_tokens()
        if not self.slots.texts:
            self._read_tokens()
            return
        self._close_gaps()
        with self._shares.next_texts(self.slots.texts) as texts:
            self._decode_texts(texts)
        self._read_tokens(num_left=1)

    def _decode_texts(self, texts: Sequence[RunningText]) -> None:
        """Append a token to texts that own the first slots."""
        num_slots = sum(len(text.slots) for text in texts)
        token_ids, lengths = [0] * num_slots, [0] * num_slots
        for text in texts:
            tokens = text.search.tokens()
            if text.num_unread:
                known = text.known_token
                tokens = [ON_DEVICE if known is None else known]
            for slot, token_id in zip(text.slots, tokens, strict=True):
                token_ids[slot], lengths[slot] = token_id, text.length
        logits = self.runner.decode(token_ids, lengths)
        for text in texts:
            text.length += 1
        self.counters.num_decode_steps += 1
        self._take_tokens(logits, texts, [text.slots for text in texts])

    def _close_gaps(self) -> None:
        """Move texts, so that the first slots are those that run, and costly texts come last."""
        sources, targets = self.slots.close_gaps()
        if sources:
            self.runner.copy_slots(sources, targets, max(text.length for text in self.slots.texts))

    def _take_tokens(self, logits: Tensor, texts: Sequence[RunningText], rows: Sequence[list[int]]) -> None:
        """Let every text select its next token.

        Args:
            logits: float[rows, V].
            rows: for each text, the rows of its slots.
        """
        if self._reads_late and all(text.takes_argmax for text in texts):
            self._unread.add(logits, texts, [of_text[0] for of_text in rows])
            return
        parents = advance(logits, [(text.search, of_text) for text, of_text in zip(texts, rows, strict=True)])
        self.counters.num_tokens += len(texts)
        self._reorder_beams(texts, parents)
        finished = [text for text in texts if text.search.done]
        if finished:
            self._retire(finished)

    def _read_tokens(self, num_left: int = 0) -> None:
        """Let the texts accept the tokens of all steps but the last ones."""
        if len(self._unread) <= num_left:
            return
        accepted = self._unread.read(num_left)
        self.counters.num_tokens += len(accepted)
        finished = [text for text in dict.fromkeys(accepted) if text.search.done]
        if finished:
            self._retire(finished)

    def _reorder_beams(self, texts: Sequence[RunningText], parents: list[list[int] | None]) -> None:
        """Copy generated positions between the slots of a beam search if beams changed places."""
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


def _note_cancelled(cancelled: deque[Future[Result]], future: Future[Result]) -> None:
    if future.cancelled():
        cancelled.append(future)
