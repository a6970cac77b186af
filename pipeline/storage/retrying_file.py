"""`RetryingFile`: read a file of an object store although the store fails in the middle of it; `read_whole`.

A 503 or a connection that is cut is no property of the file. Without retries, a shard that the store
could not deliver for a moment would be recorded as damaged. A disk is not retried: its errors are final.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.storage.filesystems import join, open_filesystem
from pipeline.storage.retrying import retry_on_oserror
from pipeline.storage.secrets import hide_secrets, without_secrets

T = TypeVar("T")
READ_FOR_S = 60.0
"""How long one read is repeated, in addition to the tries that the store's own client makes. It is shorter
than that of the output, because `retry` reads the shard again, and nothing that was made is lost."""


def open_input(filesystem: pafs.FileSystem, path: str) -> pa.NativeFile | RetryingFile:
    """Open a file that can be read at any position; on an object store, failed reads are retried."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        return filesystem.open_input_file(os.fsencode(path))  # A name need not be UTF-8.
    return RetryingFile(filesystem, path)


def open_below(root: str, file: str) -> pa.NativeFile | RetryingFile:
    """Open a file below a folder, given by its URI, as `open_input` does."""
    filesystem, path = open_filesystem(root)
    return open_input(filesystem, join(path, file))


def read_whole(filesystem: pafs.FileSystem, path: str, max_bytes: int) -> tuple[int, bytes]:
    """Return the size of a file, and its content if that is not larger than `max_bytes`."""
    if filesystem.type_name == "gcs":
        return retry_on_oserror(lambda: _stream(filesystem, path, max_bytes), READ_FOR_S, "input")
    with open_input(filesystem, path) as file:
        num_bytes = file.size()
        return num_bytes, b"" if num_bytes > max_bytes else file.read()


def _stream(filesystem: pafs.FileSystem, path: str, max_bytes: int) -> tuple[int, bytes]:
    """Read a file from its beginning: Arrow's other files of gs:// hold Python's lock during a request."""
    info = filesystem.get_file_info(path)
    if info.type != pafs.FileType.File:
        raise FileNotFoundError(f"{path} is not there")
    if info.size > max_bytes:
        return info.size, b""
    with filesystem.open_input_stream(path, compression=None) as file:
        content = file.read()
    if len(content) != info.size:
        raise OSError(f"{path} must have {info.size} bytes, got {len(content)}")
    return info.size, content


def read_file(name: str, uri: str) -> bytes:
    """Return the content of a small file, given by its path or URI.

    Args:
        name: of the setting, for errors.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        if "://" not in uri:
            return Path(uri).expanduser().read_bytes()
        with open_input(*open_filesystem(uri)) as file:
            return file.read()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else hide_secrets(str(error))
        shown = without_secrets(uri)
        raise ValueError(f"{name} must be a file that can be read, got {shown}: {reason}") from error


class RetryingFile(io.RawIOBase):
    """A remote file that is opened again, at the position it had reached, when a read fails."""

    def __init__(self, filesystem: pafs.FileSystem, path: str) -> None:
        self._filesystem = filesystem
        self._path = path
        self._position = 0
        self._file: pa.NativeFile | None = None
        self._size = self._retry(lambda file: file.size())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def size(self) -> int:
        return self._size

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        def read(file: pa.NativeFile) -> int:
            file.seek(self._position)
            num_bytes = file.readinto(buffer)
            if not num_bytes and len(buffer):
                raise OSError(
                    f"{without_secrets(self._path)} must have {self._size} bytes, got {self._position}"
                )
            return num_bytes

        num_bytes = self._retry(read) if self._position < self._size else 0
        self._position += num_bytes
        return num_bytes

    def readall(self) -> bytes:
        """Read the rest in one request; the base class makes one for every 8 KiB."""
        parts = []
        while part := self.read(max(0, self._size - self._position)):
            parts.append(part)
        return b"".join(parts)

    def close(self) -> None:
        if self._file is not None and not self._file.closed:
            self._file.close()
        super().close()

    def _retry(self, action: Callable[[pa.NativeFile], T]) -> T:
        """Call `action` with the open file until it succeeds."""

        def attempt() -> T:
            try:
                if self._file is None:
                    self._file = self._filesystem.open_input_file(self._path)
                return action(self._file)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{without_secrets(self._path)} is not there") from error
            except OSError:
                self._file = None
                raise

        return retry_on_oserror(attempt, READ_FOR_S, "input")
