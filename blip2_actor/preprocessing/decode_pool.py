"""`DecodePool`: decode untrusted bytes in child processes that may crash, hang or use up their memory.

The children are programs of their own (`decode_child`). They are not forked and do not import the caller's
program again, so the caller may have threads, CUDA or Ray. `decode_process` decides which image is to blame
for the death of a child.
"""

from __future__ import annotations

import select
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

from blip2_actor.preprocessing.decode_process import CHILD_COMMAND, DecodeProcess
from blip2_actor.preprocessing.images import DecodedImage, ImageLimits, refuse_unopened
from blip2_actor.preprocessing.sandbox.protections import SandboxReport

_MAX_AHEAD = 16
_MAX_BYTES_AHEAD = 1 << 18
"""A child always has its next image ready: at least one, and up to `_MAX_AHEAD` small ones of together this
many bytes."""


class DecodePool:
    """`num_children` decoding processes for any number of threads, started when they are first needed."""

    def __init__(
        self,
        size_px: int,
        limits: ImageLimits = ImageLimits(),
        num_children: int = 1,
        *,
        niceness: int = 0,
        command: Sequence[str] = CHILD_COMMAND,
    ) -> None:
        """Prepare the pool; no process is started yet.

        Args:
            size_px: side S of the model's square.
            limits: what one image may cost.
            num_children: number of processes, and so of images that are decoded at once.
            niceness: what the children add to the niceness of this process, as in nice(1); others go ahead
                when the CPUs are busy.
            command: the program to run as a child; the size and the limits are appended to it.
        """
        if size_px < 1:
            raise ValueError(f"size_px must be at least 1, got {size_px}")
        if num_children < 1:
            raise ValueError(f"num_children must be at least 1, got {num_children}")
        if niceness:
            command = ("nice", "-n", str(niceness), *command)
        self._limits = limits
        self._num_children = num_children
        self._processes = [DecodeProcess(size_px, limits, command) for _ in range(num_children)]
        self._idle = list(self._processes)
        self._returned = threading.Condition()  # guards _idle and _closed
        self._closed = False

    def decode(self, images: Sequence[bytes | None]) -> list[DecodedImage]:
        """Decode a batch; thread-safe, and concurrent calls share the children.

        Returns:
            One outcome per image, in order.

        Raises:
            RuntimeError: the pool is closed, or its children do not start.
        """
        refused = [refuse_unopened(data, self._limits) for data in images]
        waiting = deque((i, data) for i, data in enumerate(images) if data is not None and refused[i] is None)
        decoded = dict(self._run(waiting))
        return [decoded[i] if outcome is None else outcome for i, outcome in enumerate(refused)]

    def sandbox_report(self) -> SandboxReport:
        """Return what the children can no longer do; a child is started if none has been.

        Raises:
            RuntimeError: the pool is closed, or its children do not start.
        """
        if not any(process.sandbox for process in self._processes):
            self.decode([b"-"])
        return next(process.sandbox for process in self._processes if process.sandbox)

    def close(self) -> None:
        """Wait for running calls, then end the children."""
        with self._returned:
            self._closed = True
            self._returned.wait_for(lambda: len(self._idle) == self._num_children)
            for process in self._idle:
                process.stop()

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self, waiting: deque[tuple[int, bytes]]) -> Iterator[tuple[int, DecodedImage]]:
        borrowed: list[DecodeProcess] = []
        try:
            while waiting or borrowed:
                borrowed += self._borrow(len(waiting), wait=not borrowed)
                _feed(borrowed, waiting)
                for process in [p for p in borrowed if not p.num_pending]:
                    borrowed.remove(process)
                    self._give_back(process)
                for process in _wait_until_ready(borrowed):
                    yield from process.advance()
        finally:
            for process in borrowed:  # an error was raised: nobody needs what these processes are doing
                process.stop()
                self._give_back(process)

    def _borrow(self, max_processes: int, *, wait: bool) -> list[DecodeProcess]:
        with self._returned:
            if wait:
                self._returned.wait_for(lambda: self._idle or self._closed)
                if self._closed:
                    raise RuntimeError("the DecodePool must be open, got a call after close()")
            taken, self._idle = self._idle[:max_processes], self._idle[max_processes:]
            return taken

    def _give_back(self, process: DecodeProcess) -> None:
        with self._returned:
            self._idle.append(process)
            self._returned.notify_all()


def _feed(processes: list[DecodeProcess], waiting: deque[tuple[int, bytes]]) -> None:
    """Hand out images, to the least busy child first, until each child has enough ahead."""
    while waiting and (takers := [p for p in processes if _takes_more(p)]):
        min(takers, key=lambda p: p.num_pending).add(*waiting.popleft())
    for process in processes:
        process.send()


def _takes_more(process: DecodeProcess) -> bool:
    num_ahead = process.num_pending
    return num_ahead < 2 or (num_ahead < _MAX_AHEAD and process.num_pending_bytes < _MAX_BYTES_AHEAD)


def _wait_until_ready(processes: list[DecodeProcess]) -> list[DecodeProcess]:
    """Wait until a child can advance or is overdue; return all such children."""
    if not processes:
        return []
    poll = select.poll()
    owners = {}
    for process in processes:
        for fd, is_for_writing in process.wait_on():
            poll.register(fd, select.POLLOUT if is_for_writing else select.POLLIN)
            owners[fd] = process
    timeout_s = min(process.deadline for process in processes) - time.monotonic()
    ready = {owners[fd] for fd, _ in poll.poll(max(0.0, timeout_s) * 1000 + 1)}
    now = time.monotonic()
    return [p for p in processes if p in ready or now > p.deadline]
