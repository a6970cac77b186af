"""A second thread that encodes images on a CPU, next to the engine's own; each has its share of the cores.

Two threads with a batch each are faster than one thread that spreads every operation over all cores, because
no core waits for the other half of an operation. And a decode step, which consists of many operations too
small to share, leaves the other cores to the encoders. Figures: `benchmarks/LOG.md`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

from blip2_actor.device import set_num_threads
from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.memory import is_small
from blip2_actor.engine.model_runner import ModelRunner
from blip2_actor.engine.out_of_memory import OutOfMemory, catch_out_of_memory

Outcome = OutOfMemory | BaseException | None


class EncodeWorker:
    """Encodes batches: `give` it one, and `take` them back in order.

    Only the engine's thread calls the methods. They also set how many cores that thread uses: all of them
    while this worker is idle, except for a small model, where one core finishes an operation before a second
    one is awake.
    """

    def __init__(self, runner: ModelRunner, num_threads: int, on_done: Callable[[], None]) -> None:
        """
        Args:
            num_threads: CPU threads of the whole engine, at least 2; this worker takes half of them.
            on_done: called in the worker's thread when a batch is finished.
        """
        self._num_threads_beside = num_threads - num_threads // 2
        """CPU threads of the engine's own thread while this worker is busy."""
        self._num_threads_alone = self._num_threads_beside if is_small(runner.model) else num_threads
        self.num_images = 0
        """Images given and not yet taken back."""
        self._batches: deque[list[EncodedImage]] = deque()
        self._runner = runner
        self._num_threads = num_threads
        self._on_done = on_done
        self._given: SimpleQueue[list[EncodedImage] | None] = SimpleQueue()
        self._outcomes: SimpleQueue[Outcome] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="blip2-encode", daemon=True)
        self._thread.start()
        self._outcomes.get()  # the thread has set its own share
        # New threads start with the number that was set last, by any thread.
        set_num_threads(self._num_threads_alone)

    @property
    def has_room(self) -> bool:
        """True while it has at most one batch: with a second one it never waits for its next."""
        return len(self._batches) < 2

    @property
    def is_done(self) -> bool:
        """True if `take` would not wait."""
        return not self._outcomes.empty()

    def give(self, images: list[EncodedImage]) -> None:
        """Queue a batch."""
        if not self._batches:
            set_num_threads(self._num_threads_beside)
        self._batches.append(images)
        self.num_images += len(images)
        self._given.put(images)

    def take(self) -> tuple[list[EncodedImage], OutOfMemory | None]:
        """Wait for the first batch and return its images, which are encoded unless memory did not suffice."""
        outcome = self._outcomes.get()
        images = self._batches.popleft()
        self.num_images -= len(images)
        if not self._batches:
            set_num_threads(self._num_threads_alone)
        if isinstance(outcome, BaseException):
            raise outcome
        return images, outcome

    def close(self) -> None:
        """Finish the queued batches and end the thread."""
        self._given.put(None)
        self._thread.join()
        set_num_threads(self._num_threads)

    def _run(self) -> None:
        set_num_threads(self._num_threads // 2)
        self._outcomes.put(None)
        while (images := self._given.get()) is not None:
            self._outcomes.put(self._encode(images))
            del images  # a waiting thread must not keep images alive
            self._on_done()

    def _encode(self, images: list[EncodedImage]) -> Outcome:
        try:
            return catch_out_of_memory(lambda: self._runner.encode(images))
        except BaseException as error:  # `take` raises it in the engine's thread
            return error
