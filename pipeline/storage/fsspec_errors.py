"""An fsspec filesystem for Arrow whose errors are OSErrors.

Each fsspec filesystem raises the errors of its own client: those of aiohttp, httpx, botocore or azure are no
OSErrors. Callers would have to know them all. `HandlerWithOSErrors` turns whatever a filesystem raises into
an OSError: "not found" and "no permission" by the HTTP status, a name that its client refuses as one that is
final, and all else as one that may be retried. Only a mistake in the program keeps its type. No message holds
the secrets of a URI.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import wraps
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from pipeline.storage.retrying import InvalidArgument
from pipeline.storage.secrets import hide_secrets
from pipeline.storage.whole_files import WHOLE_FILES

Method = TypeVar("Method", bound=Callable[..., Any])
MISTAKES = (TypeError, AttributeError, NameError, LookupError, AssertionError, NotImplementedError)
"""These are bugs, here or in the filesystem; a new try raises them again."""
NAME_ERRORS = ("HfUriError", "HFValidationError", "InvalidURL", "ParamValidationError")
"""What huggingface_hub, HTTP clients and botocore raise about a name before they ask a server for it."""
NAME_REASON = "must be 'namespace/name'"
"""huggingface_hub also raises a bare ValueError. Others, such as those of gcsfs, are about an answer."""
NOT_FOUND, NO_PERMISSION = (404, 410), (401, 403)


@contextmanager
def oserrors() -> Iterator[None]:
    """Raise an OSError instead of the error of a store's client."""
    try:
        yield
    except MISTAKES:
        raise
    except Exception as error:
        translated = _oserror(error)
        if translated is error:
            raise
        raise translated from error


def _oserror(error: Exception) -> OSError:
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception):
        # fsspec's HTTP filesystem takes every failure of HEAD and GET for a missing file.
        if isinstance(cause, FileNotFoundError):
            return error
        error = cause
    status = _http_status(error)
    text = hide_secrets(str(error)) or type(error).__name__
    if status in NOT_FOUND:
        return FileNotFoundError(text)
    if status in NO_PERMISSION:
        return PermissionError(text)
    if isinstance(error, OSError) and hide_secrets(str(error)) == str(error):
        return error
    if NAME_REASON in text or any(kind.__name__ in NAME_ERRORS for kind in type(error).__mro__):
        return InvalidArgument(f"{type(error).__name__}: {text}")
    return OSError(f"{type(error).__name__}: {text}")


def _http_status(error: Exception) -> int | None:
    """Return the HTTP status that a client's error carries under one of the usual names, or None."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for holder, name in (
        (error, "status"),
        (error, "status_code"),
        (error, "code"),
        (response, "status_code"),
    ):
        value = getattr(holder, name, None)
        if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
            return int(value)
    return None


def _raising_oserrors(method: Method) -> Method:
    @wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with oserrors():
            return method(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


class HandlerWithOSErrors(pafs.FSSpecHandler):
    """Gives Arrow an fsspec filesystem; every method raises OSErrors."""

    def __init__(self, fs: AbstractFileSystem, query: str = "") -> None:
        """Wrap a filesystem.

        Args:
            query: follows the path of each file that is read, such as the signature of a URL.
        """
        super().__init__(fs)
        self._query = query

    create_dir = _raising_oserrors(pafs.FSSpecHandler.create_dir)
    delete_dir = _raising_oserrors(pafs.FSSpecHandler.delete_dir)
    delete_file = _raising_oserrors(pafs.FSSpecHandler.delete_file)

    @_raising_oserrors
    def move(self, src: str, dest: str) -> None:
        self.fs.mv(src, dest)  # Not every filesystem takes the option that the parent class gives.

    @staticmethod
    def _create_file_info(path: str, info: dict[str, Any]) -> pafs.FileInfo:
        if "mtime" not in info:
            azure, web = info.get("last_modified"), info.get("Last-Modified")
            info = {**info, "mtime": _time_of(web) if azure is None and web else azure}
        return pafs.FSSpecHandler._create_file_info(path, info)

    @_raising_oserrors
    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        try:
            return super().get_file_info_selector(selector)
        except NotADirectoryError:  # It is asked for twice, and another process has written it in between.
            return super().get_file_info_selector(selector)

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        return [self._file_info(path) for path in paths]

    def _file_info(self, path: str) -> pafs.FileInfo:
        try:
            with oserrors():
                return self._create_file_info(path, self.fs.info(path + self._query))
        except FileNotFoundError:
            return pafs.FileInfo(path, pafs.FileType.NotFound)

    @_raising_oserrors
    def open_input_stream(self, path: str) -> pa.PythonFile:
        return self.open_input_file(path)

    @_raising_oserrors
    def open_input_file(self, path: str) -> pa.PythonFile:
        # Without the question of the parent class whether the file exists: HTTP answers "no" to a 503.
        return pa.PythonFile(_InputFile(self.fs, path + self._query), mode="r")

    @_raising_oserrors
    def open_output_stream(self, path: str, metadata: Any) -> pa.PythonFile:
        return pa.PythonFile(_OutputFile(self.fs.open(path, mode="wb")), mode="w")


def _time_of(date: str) -> datetime | None:
    """Return the time of a header's date, or None if it is not one."""
    try:
        return parsedate_to_datetime(date)
    except (ValueError, OverflowError):
        return None


class _InputFile:
    """An open file, as `PythonFile` uses it.

    A web server that cannot send parts of a file sends it whole once; see `pipeline.storage.whole_files`.
    """

    def __init__(self, fs: AbstractFileSystem, path: str) -> None:
        self._fs, self._path = fs, path
        self._file: Any = WHOLE_FILES.open(fs, path) if "http" in fs.protocol else None
        if self._file is None:
            self._file = fs.open(path, mode="rb")
        if not self._file.seekable() or getattr(self._file, "size", 0) is None:
            self._fetch_whole()

    @property
    def closed(self) -> bool:
        return self._file.closed

    @_raising_oserrors
    def read(self, num_bytes: int = -1) -> bytes:
        position = self._file.tell()
        try:
            return self._file.read(num_bytes)
        except ValueError:
            if "http" not in self._fs.protocol:
                raise
            # fsspec raises it when a web server ignores which part it was asked for.
            self._fetch_whole()
            self._file.seek(position)
            return self._file.read(num_bytes)

    @_raising_oserrors
    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()

    def _fetch_whole(self) -> None:
        self._file.close()
        if "http" in self._fs.protocol:
            self._file = WHOLE_FILES.open(self._fs, self._path, must=True)
            return
        self._file = tempfile.TemporaryFile(prefix="blip2-input-")  # noqa: SIM115
        self._fs.get_file(self._path, self._file)
        self._file.seek(0)


class _OutputFile:
    """An open file, as `PythonFile` writes it."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._is_broken = False

    @property
    def closed(self) -> bool:
        return self._file.closed

    @_raising_oserrors
    def write(self, content: Any) -> int:
        self._is_broken = True
        num_bytes = self._file.write(content)
        self._is_broken = False
        return num_bytes

    @_raising_oserrors
    def flush(self) -> None:
        self._file.flush()

    @_raising_oserrors
    def close(self) -> None:
        if self._is_broken and isinstance(self._file, AbstractBufferedFile):
            self._file.closed = True  # Its close would make a file of what was written before.
            with contextlib.suppress(Exception):
                self._file.discard()
        self._file.close()
