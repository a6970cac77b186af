"""A child program with a pipe in each direction, neither of which ever blocks the parent.

The child gets requests and sends replies (`decode_messages`). This module moves their bytes and ends the
child; what a reply or a death means is decided in `decode_process`.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from itertools import islice

from blip2_actor.preprocessing.decode_messages import REQUEST, BadReply, unpack_hello
from blip2_actor.preprocessing.sandbox.protections import SandboxReport

_PIPE_BYTES = 1 << 20
_READ_BYTES = 1 << 18
_MAX_PARTS_PER_WRITE = 32
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(128 << 20)}
"""Tells glibc to keep the memory of one image for the next. Without it, a quarter of the time for a small
photograph is page faults (144 per image at 320 x 240, with it none; AMD EPYC, November 2026)."""
_IMPORT_AT_ONCE = {"PYTHON_LAZY_IMPORTS": "none"}
"""Python 3.15 and later would import some modules only when they are used, when files are out of reach."""
_INHERITED = ("LD_LIBRARY_PATH", "PYTHONDONTWRITEBYTECODE", "PYTHONHOME", "PYTHONPYCACHEPREFIX")
"""Variables that Python may need to start. No other variable is passed on, because tokens and keys are among
them."""


class ChildProcess:
    """A running child. Not thread-safe."""

    def __init__(self, command: Sequence[str]) -> None:
        paths = [os.path.abspath(path) for path in sys.path]  # the child imports what this process would
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={
                **{name: os.environ[name] for name in _INHERITED if name in os.environ},
                **_KEEP_MEMORY,
                **_IMPORT_AT_ONCE,
                "PYTHONPATH": os.pathsep.join(paths),
            },
            # Ctrl-C is for the parent alone. In a session of its own, Linux would give the child's CPU time
            # by session (sched_autogroup): no niceness would count, and on busy CPUs a small picture waited
            # up to 0.6 s for its turn.
            process_group=0,
        )
        assert process.stdin is not None and process.stdout is not None
        self._process = process
        self._stdin_fd, self._stdout_fd = process.stdin.fileno(), process.stdout.fileno()
        for fd in (self._stdin_fd, self._stdout_fd):
            os.set_blocking(fd, False)
            _enlarge(fd)
        self._unsent: deque[memoryview] = deque()
        self.received = bytearray()
        """Replies that are not taken yet; the last one may be incomplete."""
        self.sandbox: SandboxReport | None = None
        """What the child can no longer do; None until it has started."""

    @property
    def has_started(self) -> bool:
        return self.sandbox is not None

    def wait_on(self) -> list[tuple[int, bool]]:
        """Return the file descriptors that `send` and `receive` wait for, each with whether it is for
        writing."""
        return [(self._stdout_fd, False)] + ([(self._stdin_fd, True)] if self._unsent else [])

    def queue(self, data: bytes) -> None:
        """Append a request to what `send` sends."""
        self._unsent.append(memoryview(REQUEST.pack(len(data))))
        self._unsent.append(memoryview(data))

    def send(self) -> None:
        """Write as much as the pipe takes without waiting."""
        while self._unsent:
            try:
                num_sent = os.writev(self._stdin_fd, list(islice(self._unsent, _MAX_PARTS_PER_WRITE)))
            except BlockingIOError:
                return
            except BrokenPipeError:  # the child is dead, but its last replies may still be in the other pipe
                self._unsent.clear()
                return
            while num_sent:
                part = self._unsent.popleft()
                if len(part) > num_sent:
                    self._unsent.appendleft(part[num_sent:])
                num_sent -= min(num_sent, len(part))

    def receive(self) -> bool:
        """Append to `received` what the pipe holds, without waiting.

        Returns:
            False after the last byte, or if the child began with something other than its hello.
        """
        try:
            chunk = os.read(self._stdout_fd, _READ_BYTES)
        except BlockingIOError:
            return True
        self.received += chunk
        if self.sandbox is None:
            try:
                self.sandbox, num_read = unpack_hello(self.received)
            except BadReply:
                return False
            del self.received[:num_read]
        return bool(chunk)

    def end(self, after_s: float = 0.0) -> int:
        """Kill the child unless it ends by itself within `after_s` seconds; return its exit code."""
        with self._process:  # closes the pipes
            try:
                return self._process.wait(after_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                return self._process.wait()


def _enlarge(pipe_fd: int) -> None:
    """Let the pipe hold a whole photograph, so that parent and child do not wake each other every 64 KiB."""
    if sys.platform == "linux":
        try:
            fcntl.fcntl(pipe_fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        except OSError:  # the user's quota of pipe memory is used up: a pipe of the usual size works too
            pass
