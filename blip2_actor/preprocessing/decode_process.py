"""One decoding child, restarted after each death, and the decision which image is to blame.

The rule of blame: replies come in order, so the first image without a reply is the one on which the child
died. That image is tried a second time, as the first image of a new child. If that child dies too, the image
is to blame. A single death may have other causes: the out-of-memory killer, or damage that the image before
it left in memory. An image that runs out of time is not tried again. The images that were sent after it are
sent again, and their results do not change.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict

from blip2_actor.preprocessing.child_process import ChildProcess
from blip2_actor.preprocessing.decode_messages import OUT_OF_MEMORY, BadReply, unpack_reply
from blip2_actor.preprocessing.images import DecodedImage, ImageLimits
from blip2_actor.preprocessing.sandbox.protections import SandboxReport
from blip2_actor.status import Status

CHILD_COMMAND = (sys.executable, "-P", "-m", "blip2_actor.preprocessing.decode_child")
"""-P: a file called PIL.py in the working directory must not be imported."""

_MAX_STARTS = 3
_OVERDUE_S = 10.0
"""A child ends itself after `wall_s`. If it cannot, because it is stopped, it is killed this much later."""
_LAST_WORDS_S = 1.0
"""A child that has closed its output gets this long to end with its own exit code."""

Finished = list[tuple[int, DecodedImage]]
"""Images that are done, each with the index under which it was added."""


class DecodeProcess:
    """A decoding child, started when it is first needed and again after each death. Not thread-safe."""

    def __init__(self, size_px: int, limits: ImageLimits, command: Sequence[str] = CHILD_COMMAND) -> None:
        self._command = [*command, str(size_px), json.dumps(asdict(limits))]
        self._num_pixel_bytes = size_px * size_px * 3
        self._limits = limits
        self._child: ChildProcess | None = None
        self._num_failed_starts = 0
        self._pending: deque[tuple[int, bytes]] = deque()
        self._is_second_try = False  # a child has already died on the first pending image
        self.sandbox: SandboxReport | None = None
        """What the child that started last can no longer do; None if none has started."""
        self.deadline = 0.0
        """`time.monotonic()` at which the first pending image is given up."""

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    @property
    def num_pending_bytes(self) -> int:
        return sum(len(data) for _, data in self._pending)

    def add(self, index: int, data: bytes) -> None:
        """Queue an image, which `send` sends; `index` comes back with its result."""
        if not self._pending:
            self._restart_clock()
        self._pending.append((index, data))
        if self._child is None:
            self._child = self._start()
        else:
            self._child.queue(data)

    def send(self) -> None:
        """Send the queued images, or as much of them as fits; many small ones in one write."""
        if self._child is not None:
            self._child.send()

    def wait_on(self) -> list[tuple[int, bool]]:
        """Return the file descriptors that `advance` waits for, each with whether it is for writing."""
        return [] if self._child is None else self._child.wait_on()

    def advance(self) -> Finished:
        """Send and receive what is possible without waiting; return the images that are done.

        Raises:
            RuntimeError: no child starts.
        """
        child = self._child
        if child is None:
            return []
        child.send()
        had_started = child.has_started
        is_open = child.receive()
        if child.has_started and not had_started:
            self._num_failed_starts = 0
            self.sandbox = child.sandbox
            self._restart_clock()
        finished, makes_sense = self._take_replies(child)
        if finished:
            self._restart_clock()
        if not (is_open and makes_sense):
            finished += self._replace(child, is_overdue=False)
        elif time.monotonic() > self.deadline:
            finished += self._replace(child, is_overdue=True)
        return finished

    def stop(self) -> None:
        """Kill the child and forget the pending images."""
        self._pending.clear()
        self._is_second_try = False
        self._num_failed_starts = 0
        if self._child is not None:
            self._child.end()
            self._child = None

    def _restart_clock(self) -> None:
        self.deadline = time.monotonic() + self._limits.wall_s + _OVERDUE_S

    def _start(self) -> ChildProcess:
        """Start a child and queue all pending images; it reads them once it has started."""
        child = ChildProcess(self._command)
        for _, data in self._pending:
            child.queue(data)
        return child

    def _take_replies(self, child: ChildProcess) -> tuple[Finished, bool]:
        """Take the complete replies; the second value is False if the received bytes make no sense."""
        finished: Finished = []
        start = 0
        if not child.has_started:
            return finished, True
        with memoryview(child.received) as received:
            while start < len(received):
                if not self._pending:
                    return finished, False  # a reply to nothing
                try:
                    reply = unpack_reply(received, start, self._num_pixel_bytes)
                except BadReply:
                    return finished, False
                if reply is None:
                    break
                image, start = reply
                finished.append((self._pending.popleft()[0], image))
                self._is_second_try = False
        del child.received[:start]
        return finished, True

    def _replace(self, child: ChildProcess, *, is_overdue: bool) -> Finished:
        """End the child, decide about the image it was on, and start another child for the rest."""
        exit_code = child.end(after_s=0.0 if is_overdue else _LAST_WORDS_S)
        self._child = None
        finished: Finished = []
        if not child.has_started:
            self._num_failed_starts += 1
            if self._num_failed_starts == _MAX_STARTS:
                raise RuntimeError(
                    f"decoding children must start, got exit code {exit_code} {_MAX_STARTS} times; "
                    f"see what they wrote to standard error, or run: {' '.join(self._command)}"
                )
        elif self._pending:
            failure = self._failure(exit_code, is_overdue)
            if failure is not None:
                finished.append((self._pending.popleft()[0], failure))
            self._is_second_try = failure is None
        if self._pending:
            self._restart_clock()
            self._child = self._start()
        return finished

    def _failure(self, exit_code: int, is_overdue: bool) -> DecodedImage | None:
        """Return the outcome of the image on which a child died, or None if it gets a second try."""
        if exit_code == -signal.SIGPROF:
            error = f"decoding took more than cpu_s ({self._limits.cpu_s:g} s of CPU time)"
            return DecodedImage(status=Status.DECODER_TIMED_OUT, error=error)
        if is_overdue or exit_code == -signal.SIGALRM:
            error = f"decoding took more than wall_s ({self._limits.wall_s:g} s)"
            return DecodedImage(status=Status.DECODER_TIMED_OUT, error=error)
        if not self._is_second_try:
            return None
        if exit_code == OUT_OF_MEMORY:
            error = f"decoding needs more than memory_bytes ({self._limits.memory_bytes})"
            return DecodedImage(status=Status.TOO_LARGE, error=error)
        cause = signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
        error = f"the decoding process died twice on this image ({cause})"
        return DecodedImage(status=Status.DECODER_CRASHED, error=error)
