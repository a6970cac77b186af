"""On a CPU, a second thread that encodes images beside the engine's own, each with its share of the cores.

Two threads that work on images of their own do more than one that spreads every operation over all cores:
nobody waits for the other half of an operation, and a decode step, many operations too small to share, leaves
the other cores to the encoder. Figures: `benchmarks/LOG.md`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

import torch

from blip2_actor.engine.model_runner import ModelRunner
from blip2_actor.engine.out_of_memory import OutOfMemory, catch_out_of_memory
from blip2_actor.engine.request_state import EncodedImage

Outcome = OutOfMemory | BaseException | None


class EncodeWorker:
    """`give` it batches, `take` them back in order. Both are for one thread, the engine's, whose share of the
    cores they set: all while the lane is idle."""

    def __init__(self, runner: ModelRunner, num_threads: int, on_done: Callable[[], None]) -> None:
        """
        Args:
            num_threads: of the CPU, at least 2; the lane takes half of them.
            on_done: called, in the lane's thread, when there is something to take.
        """
        self.num_images = 0
        """Given and not yet taken."""
        self._batches: deque[list[EncodedImage]] = deque()
        self._runner = runner
        self._num_threads = num_threads
        self._on_done = on_done
        self._given: SimpleQueue[list[EncodedImage] | None] = SimpleQueue()
        self._outcomes: SimpleQueue[Outcome] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="blip2-encode", daemon=True)
        self._thread.start()
        self._outcomes.get()
        torch.set_num_threads(num_threads)  # also what threads get that torch has not set up yet

    @property
    def has_room(self) -> bool:
        """True while at most one batch is there: with a second one it need not wait for its next."""
        return len(self._batches) < 2

    @property
    def is_done(self) -> bool:
        """True where `take` would not wait."""
        return not self._outcomes.empty()

    def give(self, images: list[EncodedImage]) -> None:
        """Queue a batch."""
        if not self._batches:
            torch.set_num_threads(self._num_threads - self._num_threads // 2)
        self._batches.append(images)
        self.num_images += len(images)
        self._given.put(images)

    def take(self) -> tuple[list[EncodedImage], OutOfMemory | None]:
        """Wait for the first batch: its images, encoded unless memory did not suffice."""
        outcome = self._outcomes.get()
        images = self._batches.popleft()
        self.num_images -= len(images)
        if not self._batches:
            torch.set_num_threads(self._num_threads)
        if isinstance(outcome, BaseException):
            raise outcome
        return images, outcome

    def close(self) -> None:
        """End the thread, after the batches that it has."""
        self._given.put(None)
        self._thread.join()
        torch.set_num_threads(self._num_threads)

    def _run(self) -> None:
        torch.get_num_threads()  # torch sets a thread up when it is first asked, and would undo the next line
        torch.set_num_threads(self._num_threads // 2)
        self._outcomes.put(None)
        while (images := self._given.get()) is not None:
            self._outcomes.put(self._outcome(images))
            del images  # they are not this thread's to keep
            self._on_done()

    def _outcome(self, images: list[EncodedImage]) -> Outcome:
        try:
            return catch_out_of_memory(lambda: self._runner.encode(images))
        except BaseException as error:  # it belongs to whoever takes
            return error
