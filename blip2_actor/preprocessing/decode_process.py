"""One decoding child as its parent sees it: feeding it, reading its answers, judging its death.

The rule of blame: answers come in order, so the first image without one is the one the child died on. It is
tried once more, first thing in a fresh child: a second death is the image's own, a single one may have
come from outside or from the image before. Running out of time is never tried again. What had been sent
behind it is sent again and notices nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice

from blip2_actor.preprocessing.decode_child import HELLO, OUT_OF_MEMORY, REPLY, REQUEST, STATUSES
from blip2_actor.preprocessing.images import DecodedImage, ImageLimits
from blip2_actor.status import Status

CHILD_COMMAND = (sys.executable, "-P", "-m", "blip2_actor.preprocessing.decode_child")
"""-P: a file called PIL.py in the working directory must not be imported."""

_PIPE_BYTES = 1 << 20
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20)}
"""Tells glibc to keep the memory of one image for the next: a quarter of the time of a small photograph went
into page faults (144 an image at 320 x 240, now none; AMD EPYC, November 2026)."""
_READ_BYTES = 1 << 18
_MAX_STARTS = 3
_OVERDUE_S = 10.0
"""A child ends itself after `wall_s`; one that cannot, because it is stopped, is killed this much later."""
_LAST_WORDS_S = 1.0
"""A child whose output has ended is given this long to end with its own exit code."""

Ended = list[tuple[int, DecodedImage]]
"""Images that came to an end, each with the index it was added under."""


class DecodeProcess:
    """A child, started when first needed and again after each death. Not thread-safe."""

    def __init__(self, size_px: int, limits: ImageLimits, command: Sequence[str] = CHILD_COMMAND) -> None:
        self._command = [*command, str(size_px), json.dumps(asdict(limits))]
        self._num_pixel_bytes = size_px * size_px * 3
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._stdin_fd = self._stdout_fd = -1
        self._greeted = False
        self._num_failed_starts = 0
        self._pending: deque[tuple[int, bytes]] = deque()
        self._suspected = False  # has the first pending image seen a child die before?
        self._unsent: deque[memoryview] = deque()
        self._received = bytearray()
        self.deadline = 0.0
        """`time.monotonic()` at which the first pending image is given up."""

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    @property
    def num_pending_bytes(self) -> int:
        return sum(len(data) for _, data in self._pending)

    def add(self, index: int, data: bytes) -> None:
        """Send an image, or as much of it as fits; `index` comes back with its answer."""
        if not self._pending:
            self._restart_clock()
        self._pending.append((index, data))
        if self._process is None:
            self._start()
        else:
            self._queue(data)
        self._send()

    def wait_on(self) -> list[tuple[int, bool]]:
        """List what `advance` waits for: (file descriptor, whether to write to it)."""
        return [(self._stdout_fd, False)] + ([(self._stdin_fd, True)] if self._unsent else [])

    def advance(self) -> Ended:
        """Send and receive what can be without waiting.

        Raises:
            RuntimeError: children do not start.
        """
        self._send()
        alive = self._receive()
        ended, sane = self._answers()
        if ended:
            self._restart_clock()
        if not (alive and sane):
            ended += self._bury(overdue=False)
        elif time.monotonic() > self.deadline:
            ended += self._bury(overdue=True)
        return ended

    def stop(self) -> None:
        """Kill the child and forget what it was to do."""
        self._pending.clear()
        self._suspected = False
        self._num_failed_starts = 0
        self._kill()

    def _restart_clock(self) -> None:
        self.deadline = time.monotonic() + self._limits.wall_s + _OVERDUE_S

    def _start(self) -> None:
        """Start a child and queue all pending images for it; it reads them when it has come up."""
        paths = [os.path.abspath(path) for path in sys.path]
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, **_KEEP_MEMORY, "PYTHONPATH": os.pathsep.join(paths)},  # imports what we would
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        assert process.stdin is not None and process.stdout is not None
        self._process, self._greeted = process, False
        self._stdin_fd, self._stdout_fd = process.stdin.fileno(), process.stdout.fileno()
        for fd in (self._stdin_fd, self._stdout_fd):
            os.set_blocking(fd, False)
            _enlarge(fd)
        for _, data in self._pending:
            self._queue(data)

    def _queue(self, data: bytes) -> None:
        self._unsent.append(memoryview(REQUEST.pack(len(data))))
        self._unsent.append(memoryview(data))

    def _send(self) -> None:
        while self._unsent:
            try:
                num_sent = os.writev(self._stdin_fd, list(islice(self._unsent, 32)))
            except BlockingIOError:
                return
            except BrokenPipeError:  # dead; what it still said is read before it is buried
                self._unsent.clear()
                return
            while num_sent:
                part = self._unsent.popleft()
                if len(part) > num_sent:
                    self._unsent.appendleft(part[num_sent:])
                num_sent -= min(num_sent, len(part))

    def _receive(self) -> bool:
        """Read what has come; False when nothing more ever will."""
        try:
            chunk = os.read(self._stdout_fd, _READ_BYTES)
        except BlockingIOError:
            return True
        alive = bool(chunk)
        if alive and not self._greeted:
            self._greeted, self._num_failed_starts = True, 0
            self._restart_clock()
            chunk = chunk[len(HELLO) :]
        self._received += chunk
        return alive

    def _answers(self) -> tuple[Ended, bool]:
        """Take whole answers out of what was received; False when they make no sense."""
        ended: Ended = []
        start = 0
        with memoryview(self._received) as received:
            while len(received) >= start + REPLY.size:
                status, width, height, num_error, num_pixels = REPLY.unpack_from(received, start)
                error_at = start + REPLY.size
                pixels_at = error_at + num_error
                end = pixels_at + num_pixels
                ok = status == STATUSES.index(Status.OK)
                if status >= len(STATUSES) or not self._pending or num_pixels != ok * self._num_pixel_bytes:
                    return ended, False
                if len(received) < end:
                    break
                image = DecodedImage(
                    status=STATUSES[status],
                    error=str(received[error_at:pixels_at], "utf-8", "replace") or None,
                    pixels=bytes(received[pixels_at:end]) or None,
                    width=width or None,
                    height=height or None,
                )
                ended.append((self._pending.popleft()[0], image))
                self._suspected = False
                start = end
        del self._received[:start]
        return ended, True

    def _bury(self, *, overdue: bool) -> Ended:
        """Kill the child if it still lives, judge the image it was on, and start another for the rest."""
        greeted, exit_code = self._greeted, self._kill(after_s=0.0 if overdue else _LAST_WORDS_S)
        ended: Ended = []
        if not greeted:
            self._num_failed_starts += 1
            if self._num_failed_starts == _MAX_STARTS:
                raise RuntimeError(
                    f"decoding children must start, got exit code {exit_code} {_MAX_STARTS} times; "
                    f"see what they wrote to standard error, or run: {' '.join(self._command)}"
                )
        elif self._pending:
            verdict = self._judge(exit_code, overdue)
            if verdict is not None:
                ended.append((self._pending.popleft()[0], verdict))
            self._suspected = verdict is None
        if self._pending:
            self._restart_clock()
            self._start()
        return ended

    def _judge(self, exit_code: int, overdue: bool) -> DecodedImage | None:
        """Give the fate of the image a child died on, or None where it deserves another try."""
        if exit_code == -signal.SIGPROF:
            error = f"decoding took more than cpu_s ({self._limits.cpu_s:g} s of CPU time)"
            return DecodedImage(status=Status.DECODER_TIMED_OUT, error=error)
        if overdue or exit_code == -signal.SIGALRM:
            error = f"decoding took more than wall_s ({self._limits.wall_s:g} s)"
            return DecodedImage(status=Status.DECODER_TIMED_OUT, error=error)
        if not self._suspected:
            return None
        if exit_code == OUT_OF_MEMORY:
            error = f"decoding needs more than memory_bytes ({self._limits.memory_bytes})"
            return DecodedImage(status=Status.TOO_LARGE, error=error)
        cause = signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
        error = f"the decoding process died twice on this image ({cause})"
        return DecodedImage(status=Status.DECODER_CRASHED, error=error)

    def _kill(self, after_s: float = 0.0) -> int:
        """End the child, and give its exit code: its own where it is dying already."""
        self._unsent.clear()
        self._received.clear()
        process, self._process = self._process, None
        if process is None:
            return 0
        with process:  # closes the pipes in the end
            try:
                return process.wait(after_s)
            except subprocess.TimeoutExpired:
                process.kill()
                return process.wait()


def _enlarge(pipe_fd: int) -> None:
    """Let a whole photograph wait in the pipe, so that neither side wakes the other for each 64 KiB."""
    if sys.platform == "linux":
        try:
            fcntl.fcntl(pipe_fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        except OSError:  # the user's share of pipe memory is used up: the usual size works too
            pass
