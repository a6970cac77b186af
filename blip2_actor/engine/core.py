"""The engine's thread: it loads the model, then drives the device until it is closed.

Callers hand it requests and tasks from any thread. It takes them between two steps of the scheduler, so
nothing else needs a lock. Everything that computes runs in this thread, loading and scoring included; the one
exception is `EncodeWorker`. The reason is that OpenMP gives each computing thread a pool of its own, and lets
the threads of all pools sleep between two operations if there are more of them than cores: one thread too
many would halve the speed of a small model.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch

from blip2_actor.device import set_num_threads
from blip2_actor.engine.encode_worker import EncodeWorker
from blip2_actor.engine.model_runner import ModelRunner
from blip2_actor.engine.request_state import RequestState
from blip2_actor.engine.scheduler import Scheduler
from blip2_actor.engine.startup import StartedModel
from blip2_actor.request import EngineStats

T = TypeVar("T")


@dataclass(eq=False)
class Task:
    """Something else for the engine's thread to compute, between two steps."""

    work: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.work())
        except Exception as error:  # the caller in the other thread gets it
            self.future.set_exception(error)

    def fail(self, error: BaseException) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class EngineCore:
    """The thread, what it has been given, and how it ends."""

    started: StartedModel
    runner: ModelRunner
    scheduler: Scheduler

    def __init__(self, start: Callable[[int], StartedModel], num_threads: int | None) -> None:
        """Start the thread, and wait until it has loaded the model.

        Args:
            start: loads the model, given the number of CPU threads; raises what makes that impossible.
            num_threads: CPU threads; None takes what the calling thread uses.
        """
        # Ask in the caller's thread: a new thread gets the number that some engine's thread set last.
        self._num_threads = num_threads or torch.get_num_threads()
        self._start = start
        self._encode_worker: EncodeWorker | None = None
        self._arrived: deque[RequestState | Task] = deque()
        self._unfinished: dict[Future[Any], RequestState | Task] = {}
        self._wake = threading.Condition()
        self._failure: BaseException | None = None
        self._num_requests = 0
        self._busy_s = 0.0
        self.is_closed = False
        loaded: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(loaded,), name="blip2-engine", daemon=True)
        self._thread.start()
        try:
            loaded.result()
        except BaseException:  # an interrupted caller has no engine to close
            with self._wake:
                self.is_closed = True
            raise
        atexit.register(self._abandon)

    # In any thread --------------------------------------------------------------------------------------

    def enqueue(self, items: Sequence[RequestState | Task], num_requests: int = 0) -> None:
        """Hand requests or tasks to the thread.

        Args:
            num_requests: how much `EngineStats.num_requests` grows by, refused requests included.

        Raises:
            RuntimeError: the engine is closed, or has failed.
        """
        with self._wake:
            if self._failure is not None:
                raise RuntimeError("the engine has failed; build a new one") from self._failure
            if self.is_closed:
                raise RuntimeError("the engine is closed; build a new one")
            self._num_requests += num_requests
            self._arrived.extend(items)
            self._unfinished.update({item.future: item for item in items})
            self._wake.notify()
        for item in items:
            item.future.add_done_callback(self._forget)

    def call(self, work: Callable[[], T]) -> T:
        """Let the thread compute something between two steps, and wait for it."""
        task = Task(work)
        self.enqueue([task])
        result: T = task.future.result()
        return result

    def stats(self) -> EngineStats:
        """Return counters since the start."""
        return EngineStats(
            **asdict(self.scheduler.counters),
            num_requests=self._num_requests,
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting + len(self._arrived),
            busy_s=self._busy_s,
        )

    def close(self) -> None:
        """Finish what was accepted, refuse everything else, and end the thread."""
        with self._wake:
            self.is_closed = True
            self._wake.notify()
        self._thread.join()
        atexit.unregister(self._abandon)

    def _abandon(self) -> None:
        """End the thread when the interpreter exits: if it computed on, it would abort the process."""
        for future in list(self._unfinished):
            future.cancel()
        self.close()

    def _forget(self, future: Future[Any]) -> None:
        # Only the future is bound here: with the request, it would keep the image's tensors alive until the
        # garbage collector runs.
        self._unfinished.pop(future, None)

    def _notify(self) -> None:
        """Wake the thread, because the encode worker has finished a batch."""
        with self._wake:
            self._wake.notify()

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
                started = time.perf_counter()
                self.scheduler.step()
                self._busy_s += time.perf_counter() - started
        except BaseException as error:
            self._fail(error)
        finally:
            if self._encode_worker is not None:
                self._encode_worker.close()

    def _load(self) -> None:
        self.started = started = self._start(self._num_threads)
        self.runner = started.runner
        if started.has_encode_worker:
            self._encode_worker = EncodeWorker(self.runner, self._num_threads, self._notify)
        self.scheduler = Scheduler(self.runner, started.max_slots, started.encode_batch, self._encode_worker)

    def _fail(self, error: BaseException) -> None:
        """Fail every request: what broke the device broke all of them.

        The host decides whether the process goes on.
        """
        with self._wake:
            self._failure = error
        for item in list(self._unfinished.values()):
            if not item.future.done() or item.future.cancelled():
                item.fail(error)

    def _take_arrivals(self) -> bool:
        """Wait until there is something to do, and take what has arrived; return False if closed and done."""
        tasks = []
        with self._wake:
            self._wake.wait_for(
                lambda: (
                    self._arrived
                    or self.scheduler.can_step
                    or (self.is_closed and not self.scheduler.has_work)
                )
            )
            while self._arrived:
                arrival = self._arrived.popleft()
                if isinstance(arrival, Task):
                    tasks.append(arrival)
                else:
                    self.scheduler.add(arrival)
        for task in tasks:
            task.run()
        with self._wake:
            return bool(self._arrived) or self.scheduler.has_work or not self.is_closed
