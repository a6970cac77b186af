"""Reading through a bad spell of an object store: a 503, a connection that is cut, in the middle of a file.

Without it, a shard that a store could not give for a moment would pass for one that is damaged.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

T = TypeVar("T")
PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Waited before each new try, on top of the tries that the store's own client makes."""

log = logging.getLogger(__name__)


def open_input(filesystem: pafs.FileSystem, path: str) -> pa.NativeFile | RetryingFile:
    """A file to read from at any place; errors of a disk are final, those of a store are tried again."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        return filesystem.open_input_file(path)
    return RetryingFile(filesystem, path)


class RetryingFile(io.RawIOBase):
    """A remote file that is opened again, at the place it had come to, when reading it fails."""

    def __init__(
        self, filesystem: pafs.FileSystem, path: str, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._filesystem = filesystem
        self._path = path
        self._sleep = sleep
        self._at = 0
        self._file: pa.NativeFile | None = None
        self._size = self._patiently(lambda file: file.size())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def size(self) -> int:
        return self._size

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        def read(file: pa.NativeFile) -> int:
            file.seek(self._at)
            return file.readinto(buffer)

        num_bytes = self._patiently(read) if self._at < self._size else 0
        self._at += num_bytes
        return num_bytes

    def close(self) -> None:
        if self._file is not None and not self._file.closed:
            self._file.close()
        super().close()

    def _patiently(self, action: Callable[[pa.NativeFile], T]) -> T:
        for pause_s in (*PAUSES_S, None):
            try:
                if self._file is None:
                    self._file = self._filesystem.open_input_file(self._path)
                return action(self._file)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{self._path} is not there") from error
            except PermissionError:
                raise
            except OSError as error:
                self._file = None
                if pause_s is None:
                    raise
                log.warning("Reading %s failed, trying again in %.1f s: %s", self._path, pause_s, error)
                self._sleep(pause_s)
        raise AssertionError("the last try returns or raises")
