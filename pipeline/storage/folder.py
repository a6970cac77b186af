"""`Folder`: files under one URI, each of which is there as a whole or not at all.

See `pipeline.storage.put` for how a file is written.

A folder may retry: `with_retries` returns one that repeats a request for a while after an OSError (a disk
that is full, a store that answers 503), unless no new try can succeed (`retrying.is_final`). Repeating is
safe, also when the request was carried out and only its answer was lost: `put` replaces the file with the
same content, `get`, `read`, `names` and `files` change nothing, and `delete` and `erase` accept that the
file is already gone. A new folder does not retry, so that `status`, `plan` and the checks before a run answer
at once.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import IO, NamedTuple, TypeAlias, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.storage.filesystems import at_once, files_below, open_filesystem
from pipeline.storage.fsspec_store import s3_requests
from pipeline.storage.put import is_object_store, put, put_new
from pipeline.storage.retrying import RETRY_FOR_S, retry_on_oserror
from pipeline.storage.retrying_file import open_input
from pipeline.storage.secrets import hide_secrets, without_secrets

T = TypeVar("T")
OpenFile: TypeAlias = "pa.NativeFile | io.BufferedReader"

ASIDE = "_blip2/tmp"  # where a file is written before it is renamed or moved; emptied when a run starts
PROBE = "_blip2/probe-"  # begins the names of files that test whether a folder can be written
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4095  # of the file systems of Linux
MAX_KEY_BYTES = 1024  # of S3, Google Cloud Storage and Azure
SPOOL_BYTES = 64 << 20  # larger content of `put_made` goes to a disk
PROBE_BYTES = 4096  # a full disk still takes an empty file


class WrittenFile(NamedTuple):
    """What a listing tells about a file."""

    name: str
    """Relative to the folder."""
    num_bytes: int
    written: float
    """When, in seconds since 1970 by the clock of the store; 0 if the store does not tell."""


@dataclass(frozen=True, repr=False)
class Folder:
    """Files under one URI, by their relative names; picklable, so that workers write by themselves."""

    uri: str
    retry_for_s: float = 0.0
    """How long a request is repeated after an OSError; 0 raises the first one."""
    filesystem: pafs.FileSystem = field(default=None, kw_only=True, compare=False)
    """Opened from the URI; only `with_retries` passes it, to share it."""
    root: str = field(default="", kw_only=True, compare=False)
    """Path of the folder in `filesystem`."""

    def __post_init__(self) -> None:
        if self.filesystem is not None:
            return
        filesystem, root = open_filesystem(self.uri)
        object.__setattr__(self, "filesystem", filesystem)
        object.__setattr__(self, "root", root.rstrip("/"))

    def __reduce__(self) -> tuple[type[Folder], tuple[str, float]]:
        # A relative path is relative to the driver's working directory, also in a worker with another one.
        return Folder, (self.root if self.is_local else self.uri, self.retry_for_s)

    def __str__(self) -> str:
        """Return the URI for people, without secrets."""
        return without_secrets(self.uri)

    def __repr__(self) -> str:
        # Ray stores what the arguments of stages look like.
        return f"Folder({str(self)!r}, {self.retry_for_s})"

    def with_retries(self, retry_for_s: float = RETRY_FOR_S) -> Folder:
        """Return this folder with requests that are repeated for `retry_for_s` seconds; 0 tries once."""
        return replace(self, retry_for_s=retry_for_s)

    def sibling_uri(self, suffix: str) -> str:
        """Return the URI of a folder next to this one."""
        return self._uri_with(f"-{suffix}")

    def below(self, name: str) -> Folder:
        """Return a folder inside this one."""
        return Folder(self._uri_with(f"/{name}"), self.retry_for_s)

    def _uri_with(self, ending: str) -> str:
        path, question, options = self.uri.partition("?") if "://" in self.uri else (self.uri, "", "")
        return f"{path.rstrip('/')}{ending}{question}{options}"

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    @property
    def moves_files(self) -> bool:
        """Whether a file is moved to its name; some filesystems move none to a name that is taken."""
        return not (self.is_local or is_object_store(self.filesystem))

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _aside(self) -> str:
        """Return the path of a temporary file."""
        return self.path(f"{ASIDE}/{uuid.uuid4().hex}")

    def put(self, name: str, content: bytes | IO[bytes]) -> None:
        """Write or replace a file in one step, so that no reader sees half of it."""
        self._retry(lambda: self._put_once(name, content))

    def put_new(self, name: str, content: bytes) -> bool:
        """Write a file unless there is one; return whether it was written. See `put.put_new`."""
        return put_new(self.uri, self.filesystem, self.path(name), self._aside(), content)

    def put_made(self, name: str, make: Callable[[IO[bytes]], T]) -> T:
        """Write or replace a file by what `make` writes into an empty file, and return what it returns.

        It is prepared in memory, or on a disk if it becomes large: on that of the output, if the output is on
        one, as /tmp may be small. There a retry makes it from the beginning; a full /tmp is no matter of the
        output, and ends it at once.
        """

        def attempt() -> T:
            where = self.path(ASIDE) if self.is_local else None
            if where is not None:
                os.makedirs(where, exist_ok=True)
            with tempfile.SpooledTemporaryFile(SPOOL_BYTES, dir=where) as file:
                made = make(file)
                self.put(name, file)
            return made

        return retry_on_oserror(attempt, self.retry_for_s, is_request=False) if self.is_local else attempt()

    def get(self, name: str) -> bytes | None:
        """Return the content of a file, or None when there is none."""
        return self._retry(lambda: self._get_once(name))

    def get_listed(self, name: str) -> bytes | None:
        """Return the same as `get`, by one request if the file is there and `S3Requests` can."""
        return s3_requests(self.uri).get(self.filesystem, self.path(name)) or self.get(name)

    def read(self, name: str, action: Callable[[OpenFile], T]) -> T:
        """Return what `action` makes of an open file, which must exist; a retry starts from the beginning."""

        def attempt() -> T:
            with self.open(name) as file:
                return action(file)

        return self._retry(attempt)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[OpenFile]:
        """Open a file that can be read at any position; it must exist. Nothing is retried here.

        Raises:
            pa.ArrowInvalid, OSError: what the block reads is damaged; the message names the file.
        """
        file = open_input(self.filesystem, self.path(name))
        try:
            # Arrow takes a short read of a Python file for the end of the file; a buffered reader reads on.
            with file if isinstance(file, pa.NativeFile) else io.BufferedReader(file) as opened:
                yield opened
        except (pa.ArrowInvalid, OSError) as error:
            # Arrow has a plain OSError for a damaged page; those of a disk or a store say which they are.
            if type(error) not in (pa.ArrowInvalid, OSError) or getattr(error, "errno", None) is not None:
                raise
            raise type(error)(f"{name} in {self} cannot be read: {str(error).rstrip('. ')}") from error

    def delete(self, name: str) -> None:
        """Delete a file; do nothing when there is none."""
        self._retry(lambda: self._delete_once(name))

    def delete_at_once(self, names: Sequence[str]) -> bool:
        """Delete files by few requests and return True, or return False if `S3Requests` cannot."""
        return s3_requests(self.uri).delete(self.filesystem, [self.path(name) for name in names])

    def delete_files(self, names: Sequence[str]) -> None:
        """Delete files, by few requests or several at the same time."""
        if names and not self.delete_at_once(names):
            at_once(self.delete, names)

    def erase(self, under: str = "") -> None:
        """Delete this folder, or one inside it, with all its files; do nothing when there is none.

        An object store deletes a thousand files in one request, and no empty object stays for the folder.
        """
        self._retry(lambda: self._erase_once(under))

    def drop_if_empty(self, name: str) -> None:
        """Remove a folder of a disk when it is empty; for object stores see `ledger.sweep.drop_markers`."""
        if self.is_local:
            with contextlib.suppress(OSError):
                os.rmdir(self.path(name))

    def names(self, under: str = "") -> list[str]:
        """Return the relative names of all files below a folder, in no order; none when it does not exist."""
        return [file.name for file in self.files(under)]

    def files(self, under: str = "") -> list[WrittenFile]:
        """Return all files below a folder, in no order; none when it does not exist."""
        return self._retry(lambda: self._list_once(under))

    def file(self, name: str) -> WrittenFile | None:
        """Return a file as a listing tells about it, or None when there is none."""
        (info,) = self._retry(lambda: self.filesystem.get_file_info([self.path(name)]))
        is_file = info.type == pafs.FileType.File
        return self._written(info.path, info.size, info.mtime_ns or 0) if is_file else None

    def require_names(self, names: Iterable[str]) -> None:
        """Raise ValueError when one of these names is too long for the store."""
        for name in names:
            path = self.path(name)
            longest = max(len(part.encode()) for part in name.split("/"))
            if self.is_local and longest > MAX_NAME_BYTES:
                what, limit = f"a name of {longest} bytes", f"{MAX_NAME_BYTES} in a name"
            elif len(path.encode()) > (limit_bytes := MAX_PATH_BYTES if self.is_local else MAX_KEY_BYTES):
                what, limit = f"a path of {len(path.encode())} bytes", f"{limit_bytes} in a path"
            else:
                continue
            raise ValueError(
                f"output must have room for the names of its files, got {what} for {name}, and {self} takes "
                f"at most {limit}; rename the input file, or give it a shorter path"
            )

    def seconds_since_write(self, name: str) -> float | None:
        """Return how long ago a file was written, or None when there is none.

        It is the difference of two clocks: that of this machine and that of the store.
        """
        file = self.file(name)
        return None if file is None or not file.written else time.time() - file.written

    def require_writable(self) -> None:
        """Raise ValueError unless a file can be written, replaced and deleted here; nothing is retried."""
        probe = f"{PROBE}{uuid.uuid4().hex}"
        try:
            self._put_once(probe, bytes(PROBE_BYTES))
            try:
                if self.moves_files:  # HDFS, for one, moves no file to a name that is taken.
                    self._put_once(probe, b"replaced")
                    if self._get_once(probe) != b"replaced":
                        raise OSError("no file can be replaced there")
            finally:
                self._delete_once(probe)
        except OSError as error:
            said = (self.is_local and error.strerror) or str(error)  # without the path of the probe
            reason = hide_secrets(" ".join(said.split()))  # of Azure, a page with the signed URL
            raise ValueError(
                f"output must be a folder that can be written, got {self}: {reason}; "
                "give another --output or the missing permission"
            ) from error

    def _retry(self, request: Callable[[], T]) -> T:
        return retry_on_oserror(request, self.retry_for_s)

    def _put_once(self, name: str, content: bytes | IO[bytes]) -> None:
        put(self.uri, self.filesystem, self.path(name), self._aside(), content)

    def _get_once(self, name: str) -> bytes | None:
        try:
            with self.filesystem.open_input_file(self.path(name)) as file:
                content = file.read(file.size())
                if len(content) < file.size():
                    raise OSError(f"{name} must have {file.size()} bytes, got {len(content)}")
                return content
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _delete_once(self, name: str) -> None:
        delete = os.remove if self.is_local else self.filesystem.delete_file
        with contextlib.suppress(FileNotFoundError):
            delete(self.path(name))

    def _erase_once(self, under: str) -> None:
        try:
            self.filesystem.delete_dir(self.path(under).rstrip("/"))
        except OSError:
            # It may be gone, for which stores have different errors; or a store of Azure does not take many
            # requests in one.
            for file in self._list_once(under):
                self._delete_once(file.name)

    def _list_once(self, under: str) -> list[WrittenFile]:
        base = self.path(under).rstrip("/")
        return [self._written(*found) for found in files_below(self.filesystem, base)]

    def _written(self, path: str, num_bytes: int, written_ns: int) -> WrittenFile:
        return WrittenFile(path[len(self.root) + 1 :], num_bytes, written_ns / 1e9)
