"""`DecodePool`: decoding bytes from strangers in processes that may crash, hang or swell.

The children are programs of their own (`decode_child`), neither forked nor re-importing the caller, so
that a caller with threads, CUDA or Ray inside is no concern of theirs. Who is to blame when one dies is
decided in `decode_process`.
"""

from __future__ import annotations

import select
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

from blip2_actor.preprocessing.decode_process import CHILD_COMMAND, DecodeProcess
from blip2_actor.preprocessing.images import DecodedImage, ImageLimits, refuse_unopened

_MAX_AHEAD = 16
_MAX_BYTES_AHEAD = 1 << 18
"""A child has the next image at hand when it ends one: at least one, of small ones up to this much."""


class DecodePool:
    """`num_children` decoding processes for any number of threads; started when first needed."""

    def __init__(
        self,
        size_px: int,
        limits: ImageLimits = ImageLimits(),
        num_children: int = 1,
        *,
        command: Sequence[str] = CHILD_COMMAND,
    ) -> None:
        """Prepare the pool; nothing runs yet.

        Args:
            size_px: side of the square the model takes.
            command: the program to run as child; it gets the size and the limits appended.
        """
        if size_px < 1:
            raise ValueError(f"size_px must be at least 1, got {size_px}")
        if num_children < 1:
            raise ValueError(f"num_children must be at least 1, got {num_children}")
        self._limits = limits
        self._num_children = num_children
        self._idle = [DecodeProcess(size_px, limits, command) for _ in range(num_children)]
        self._returned = threading.Condition()  # guards _idle and _closed
        self._closed = False

    def decode(self, images: Sequence[bytes | None]) -> list[DecodedImage]:
        """Decode a batch, in order; thread-safe: calls share the children.

        Raises:
            RuntimeError: the pool is closed, or children do not start.
        """
        fates = [refuse_unopened(data, self._limits) for data in images]
        todo = deque((i, data) for i, data in enumerate(images) if data is not None and fates[i] is None)
        decoded = dict(self._run(todo))
        return [decoded[i] if fate is None else fate for i, fate in enumerate(fates)]

    def close(self) -> None:
        """Let running calls finish, then end the children."""
        with self._returned:
            self._closed = True
            self._returned.wait_for(lambda: len(self._idle) == self._num_children)
            for process in self._idle:
                process.stop()

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self, todo: deque[tuple[int, bytes]]) -> Iterator[tuple[int, DecodedImage]]:
        mine: list[DecodeProcess] = []
        try:
            while todo or mine:
                mine += self._borrow(len(todo), wait=not mine)
                _feed(mine, todo)
                for process in [p for p in mine if not p.num_pending]:
                    mine.remove(process)
                    self._give_back(process)
                for process in _ready(mine):
                    yield from process.advance()
        finally:
            for process in mine:  # something was raised: what these are doing is nobody's any more
                process.stop()
                self._give_back(process)

    def _borrow(self, most: int, *, wait: bool) -> list[DecodeProcess]:
        with self._returned:
            if wait:
                self._returned.wait_for(lambda: self._idle or self._closed)
                if self._closed:
                    raise RuntimeError("the DecodePool must be open, got a call after close()")
            taken, self._idle = self._idle[:most], self._idle[most:]
            return taken

    def _give_back(self, process: DecodeProcess) -> None:
        with self._returned:
            self._idle.append(process)
            self._returned.notify_all()


def _feed(processes: list[DecodeProcess], todo: deque[tuple[int, bytes]]) -> None:
    """Hand out images, to the least busy first, until each child has enough ahead."""
    while todo:
        hungry = [p for p in processes if _wants_more(p)]
        if not hungry:
            return
        min(hungry, key=lambda p: p.num_pending).add(*todo.popleft())


def _wants_more(process: DecodeProcess) -> bool:
    ahead = process.num_pending
    return ahead < 2 or (ahead < _MAX_AHEAD and process.num_pending_bytes < _MAX_BYTES_AHEAD)


def _ready(processes: list[DecodeProcess]) -> list[DecodeProcess]:
    """Wait until a child can go on or is overdue."""
    if not processes:
        return []
    poll = select.poll()
    owners = {}
    for process in processes:
        for fd, to_write in process.wait_on():
            poll.register(fd, select.POLLOUT if to_write else select.POLLIN)
            owners[fd] = process
    patience_s = min(process.deadline for process in processes) - time.monotonic()
    ready = {owners[fd] for fd, _ in poll.poll(max(0.0, patience_s) * 1000 + 1)}
    now = time.monotonic()
    return [p for p in processes if p in ready or now > p.deadline]
