"""Bytes that a process keeps for long: in memory while they are few, in temporary files from then on."""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from dataclasses import dataclass
from typing import Any

MEMORY_BYTES = 64 << 20
"""What a process keeps in memory; all later bytes go to files."""
FILE_BYTES = 64 << 20
"""A file takes no more than this, so that its room is free when all that is in it is of no use."""


class UnnamedFile:
    """A temporary file without a name; it disappears with this object."""

    def __init__(self) -> None:
        with tempfile.TemporaryFile() as file:
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self.num_bytes = 0

    def append(self, content: bytes) -> int:
        """Write bytes, and return where they begin."""
        start, written, view = self.num_bytes, 0, memoryview(content)
        while written < len(content):
            written += os.pwrite(self._descriptor, view[written:], start + written)
        self.num_bytes = start + written
        return start

    def read(self, start: int, num_bytes: int) -> bytes:
        """Return bytes that were written."""
        parts = []
        while num_bytes:
            part = os.pread(self._descriptor, num_bytes, start)
            if not part:
                raise _lost()
            parts.append(part)
            start, num_bytes = start + len(part), num_bytes - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, buffer: Any, start: int) -> int:
        """Fill a buffer with bytes that were written, as far as there are any, and return how many."""
        num_bytes = os.preadv(self._descriptor, [buffer], start)
        if not num_bytes and len(buffer) and start < self.num_bytes:
            raise _lost()
        return num_bytes


def _lost() -> OSError:
    return OSError(f"a temporary file below {tempfile.gettempdir()} has lost its content")


@dataclass(frozen=True, slots=True)
class Spilled:
    """Bytes in a temporary file."""

    file: UnnamedFile
    start: int
    num_bytes: int

    def __bytes__(self) -> bytes:
        return self.file.read(self.start, self.num_bytes)


class Spill:
    """Takes bytes, and returns what keeps them; thread-safe.

    Args:
        memory_bytes: what is kept in memory before the first file is made.
    """

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._file: UnnamedFile | None = None
        self._process = os.getpid()

    def keep(self, content: bytes) -> bytes | Spilled:
        """Return the content, or where it is in a file; `bytes` of either returns the content.

        Without room in the folder for temporary files, the content stays in memory.
        """
        with self._lock:
            self._memory_bytes -= len(content)
            if self._memory_bytes >= 0:
                return content
            try:
                if self._file is None or self._file.num_bytes >= FILE_BYTES or os.getpid() != self._process:
                    self._file = UnnamedFile()
                    self._process = os.getpid()  # a forked child must not share a file
                start = self._file.append(content)
            except OSError:
                return content
            return Spilled(self._file, start, len(content))
