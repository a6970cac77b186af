"""The engine's thread: it loads the model, then drives the device until it is closed.

Callers hand it requests and tasks from any thread. It takes them between two steps of the scheduler, so
nothing else needs a lock. All computation runs in this thread, including loading and scoring, except for
`EncodeWorker`. The reason is that OpenMP gives each computing thread its own pool, and lets the threads of
all pools sleep between two operations if there are more of them than cores: one thread too many would halve
the speed of a small model.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from blip2_actor.device import set_num_threads
from blip2_actor.engine.encode_stream import EncodeStream
from blip2_actor.engine.encode_worker import EncodeWorker
from blip2_actor.engine.engine_thread import EngineThread
from blip2_actor.engine.model_runner import ModelRunner
from blip2_actor.engine.own_process import OwnProcess
from blip2_actor.engine.request_state import RequestState, run_callbacks
from blip2_actor.engine.scheduler import Scheduler
from blip2_actor.engine.startup import StartedModel
from blip2_actor.engine.unread_tokens import reads_late
from blip2_actor.request import EngineStats, StepWatcher

logger = logging.getLogger(__name__)

T = TypeVar("T")

Start = Callable[..., StartedModel]
"""Loads a model, given `num_threads`, and `require_wanted`, which raises if the model is no longer needed."""


@dataclass(eq=False)
class Task:
    """Other work for the engine's thread, between two steps."""

    work: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.work())
        except BaseException as error:  # the caller in the other thread gets it
            self.future.set_exception(error)

    def fail(self, error: BaseException) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class EngineCore:
    """The thread, the work given to it, and how it ends.

    The thread holds this object, and nothing here holds the `Engine`; so an engine without other references
    is noticed (`release`).
    """

    started: StartedModel
    runner: ModelRunner
    scheduler: Scheduler

    def __init__(self, start: Start, num_threads: int | None) -> None:
        """Start the thread, and wait until it has loaded the model.

        Args:
            start: loads the model; raises what makes that impossible.
            num_threads: CPU threads; None takes what the calling thread uses.
        """
        # Ask in the caller's thread: a new thread gets the number that some engine's thread set last.
        self._num_threads = num_threads or torch.get_num_threads()
        self._start = start
        self._process = OwnProcess()
        self._encode_worker: EncodeWorker | None = None
        self._arrived: deque[RequestState | Task] = deque()
        self._unfinished: dict[Future[Any], RequestState | Task] = {}
        self._lock = threading.Lock()
        """Guards what callers and the thread both change: what has arrived, closing and failing."""
        self._wake_ups: SimpleQueue[None] = SimpleQueue()
        """An entry tells the thread to look again. Unlike a condition, a queue may be used by the garbage
        collector, whatever the thread in which it runs is doing."""
        self._failure: BaseException | None = None
        self._num_requests = 0
        self._busy_s = 0.0
        self.step_watchers: list[StepWatcher] = []
        """Called in the thread after each step."""
        self.is_closed = self._is_abandoned = False
        loaded: Future[None] = Future()
        self._thread = EngineThread(self._run, (loaded,), self._abandon)
        self._thread.start()
        try:
            loaded.result()
        except BaseException:  # an interrupted caller has no engine to close
            self.release()
            raise

    # In any thread --------------------------------------------------------------------------------------

    def require_own_process(self) -> None:
        """Raise RuntimeError in a forked child."""
        self._process.require_current()

    def require_caller_may_wait(self) -> None:
        """Raise RuntimeError if the caller would wait for ever: in a forked child, or in the engine's
        thread, which runs done callbacks, `on_text` and logits processors."""
        self._process.require_current()
        if threading.current_thread() is self._thread:
            raise RuntimeError(
                "generate, stream, score and features must not be called in the engine's own thread, got a "
                "call in a callback or a logits processor; call submit in a callback, or use another thread"
            )

    def enqueue(self, items: Sequence[RequestState | Task], num_requests: int = 0) -> None:
        """Hand requests or tasks to the thread.

        Args:
            num_requests: how much `EngineStats.num_requests` grows by, refused requests included.

        Raises:
            RuntimeError: the engine is closed, or has failed.
        """
        with self._lock:
            if self._failure is not None:
                raise RuntimeError("the engine has failed; build a new one") from self._failure
            self._require_open()
            self._num_requests += num_requests
            self._arrived.extend(items)
            self._unfinished.update({item.future: item for item in items})
        self._wake_ups.put(None)
        # A future that a caller keeps must keep alive neither its request, with the tensors of its image, nor
        # this object, with the whole model.
        for callback in (self._unfinished.pop, self.scheduler.note_cancelled):
            for item in items:
                item.future.add_done_callback(callback)

    def _require_open(self) -> None:
        if self.is_closed:
            raise RuntimeError("the engine is closed; build a new one")

    def call(self, work: Callable[[], T]) -> T:
        """Let the thread compute something between two steps, and wait for it."""
        self.require_caller_may_wait()
        task = Task(work)
        try:
            self.enqueue([task])
            result: T = task.future.result()
            return result
        except BaseException:  # the caller may be interrupted, and waits no longer
            task.future.cancel()
            raise

    def stats(self) -> EngineStats:
        """Return counters since the start."""
        return EngineStats(
            **asdict(self.scheduler.counters),
            num_encode_calls=self.scheduler.encoding.num_calls,
            num_images_encoded=self.scheduler.encoding.num_images,
            num_requests=self._num_requests,
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting + len(self._arrived),
            busy_s=self._busy_s,
        )

    def close(self) -> None:
        """Finish what was accepted, refuse everything else, and end the thread.

        In a done callback this does not wait for the end, and in a forked child it does nothing.
        """
        if not self._process.is_current:
            return
        with self._lock:
            self.is_closed = True
        self._wake_ups.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.wait()

    def release(self) -> None:
        """Let the thread finish what was accepted and end, without waiting: the engine has no references.

        The garbage collector calls this in any thread at any point, so it takes no lock. It needs none,
        because nothing can be enqueued any more.
        """
        self.is_closed = True
        self._wake_ups.put(None)

    def _abandon(self) -> None:
        """Refuse everything, and let the thread cancel what was accepted and end: the interpreter exits."""
        with self._lock:
            self.is_closed = self._is_abandoned = True
        self._wake_ups.put(None)

    # In the engine's thread -----------------------------------------------------------------------------

    def _run(self, loaded: Future[None]) -> None:
        try:
            set_num_threads(self._num_threads)
            self._load()
        except BaseException as error:
            loaded.set_exception(error)
            return
        loaded.set_result(None)
        try:
            while self._take_arrivals():
                self._step()
            self._cancel_unfinished()
        except BaseException as error:
            self._fail(error)
        finally:
            if self._encode_worker is not None:
                self._encode_worker.close()

    def _step(self) -> None:
        counters, encoding = self.scheduler.counters, self.scheduler.encoding
        num_images, num_tokens = encoding.num_images, counters.num_tokens
        started = time.perf_counter()
        self.scheduler.step()
        seconds = time.perf_counter() - started
        self._busy_s += seconds
        for watch in list(self.step_watchers):
            try:
                watch(seconds, encoding.num_images - num_images, counters.num_tokens - num_tokens)
            except BaseException:  # a fault of a watcher must not end all requests
                self.step_watchers[:] = [other for other in self.step_watchers if other is not watch]
                logger.exception("a step watcher has raised an error; it is not called again")

    def _load(self) -> None:
        self.started = started = self._start(num_threads=self._num_threads, require_wanted=self._require_open)
        self.runner = started.runner
        ahead: EncodeWorker | EncodeStream | None = None
        if started.encodes_ahead and self.runner.device.type == "cuda":
            ahead = EncodeStream(self.runner)
        elif started.encodes_ahead:
            wake_up = partial(self._wake_ups.put, None)
            ahead = self._encode_worker = EncodeWorker(self.runner, self._num_threads, wake_up)
        self.scheduler = Scheduler(
            self.runner,
            self.runner.num_slots,
            started.encode_batch,
            ahead,
            reads_late=reads_late(self.runner.device),
            shares_steps=self.runner.device.type == "cpu",
        )

    def _fail(self, error: BaseException) -> None:
        """Fail every request: an error of the device affects all of them.

        The host decides whether the process goes on.
        """
        with self._lock:
            self._failure = error
        for item in list(self._unfinished.values()):
            if not item.future.done() or item.future.cancelled():
                item.fail(error)

    def _cancel_unfinished(self) -> None:
        """Cancel what is left when the engine is abandoned."""
        for item in list(self._unfinished.values()):
            run_callbacks(item.future.cancel)

    def _take_arrivals(self) -> bool:
        """Wait until there is something to do, and take what has arrived; return False if closed and done."""
        while not self._has_something_to_do():
            self._wake_ups.get()
        if self._is_abandoned:
            return False
        with self._lock:
            arrived = list(self._arrived)
            self._arrived.clear()
        # Without the lock: ending a request runs the done callbacks of its future, which may call `submit`.
        for item in arrived:
            if isinstance(item, RequestState):
                self.scheduler.add(item)
        for item in arrived:
            if isinstance(item, Task) and not self._is_abandoned:
                item.run()
        with self._lock:
            return bool(self._arrived) or self.scheduler.has_work or not self.is_closed

    def _has_something_to_do(self) -> bool:
        while not self._wake_ups.empty():  # before looking: a later change comes with an entry of its own
            self._wake_ups.get()
        is_over = self._is_abandoned or (self.is_closed and not self.scheduler.has_work)
        return bool(self._arrived or self.scheduler.can_step or is_over)
