"""`Folder`: a place where files appear whole or not at all, on a disk or in an object store.

On a disk a file is written aside, flushed and renamed; in an object store one PUT does the same.
"""

from __future__ import annotations

import contextlib
import io
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.storage.filesystems import open_filesystem
from pipeline.storage.retrying_file import open_input
from pipeline.storage.secrets import without_secrets

ASIDE = "_blip2/tmp"
"""Where a file on a disk waits until it is whole; swept when a run starts."""

PROBE = "_blip2/probe-"
"""Begins the names of empty files that show whether a folder can be written."""


@dataclass(frozen=True)
class Folder:
    """Files under one URI by their relative names; picklable, so that workers write by themselves."""

    uri: str
    filesystem: pafs.FileSystem = field(init=False, repr=False, compare=False)
    root: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        filesystem, root = open_filesystem(self.uri)
        object.__setattr__(self, "filesystem", filesystem)
        object.__setattr__(self, "root", root.rstrip("/"))

    def __reduce__(self) -> tuple[type[Folder], tuple[str]]:
        # A relative path means the driver's working folder, also in a worker that has another one.
        return Folder, (self.root if self.is_local else self.uri,)

    def __str__(self) -> str:
        """The URI for people, without secrets."""
        return without_secrets(self.uri)

    def beside(self, suffix: str) -> str:
        """The URI of a folder next to this one."""
        path, question, options = self.uri.partition("?") if "://" in self.uri else (self.uri, "", "")
        return f"{path.rstrip('/')}-{suffix}{question}{options}"

    def below(self, name: str) -> Folder:
        """A folder inside this one."""
        path, question, options = self.uri.partition("?") if "://" in self.uri else (self.uri, "", "")
        return Folder(f"{path.rstrip('/')}/{name}{question}{options}")

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def put(self, name: str, content: bytes) -> None:
        """Write or replace a file in one step that readers cannot see half done."""
        if not self.is_local:
            # One write and one close: a PUT, or a multipart upload that exists when it is complete.
            with self.filesystem.open_output_stream(self.path(name), compression=None) as stream:
                stream.write(content)
            return
        aside = self.path(f"{ASIDE}/{uuid.uuid4().hex}")
        target = self.path(name)
        for attempt in (1, 2):
            try:
                os.makedirs(os.path.dirname(aside), exist_ok=True)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                with open(aside, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(aside, target)
                return
            except FileNotFoundError:
                # A sweep removed an empty folder between our making it and our using it.
                if attempt == 2:
                    raise
            except OSError:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(aside)
                raise

    def get(self, name: str) -> bytes | None:
        """The content of a file, or None where there is none."""
        try:
            with open_input(self.filesystem, self.path(name)) as file:
                content = file.read(file.size())
                if len(content) < file.size():
                    raise OSError(f"{name} must have {file.size()} bytes, got {len(content)}")
                return content
        except (FileNotFoundError, NotADirectoryError):
            return None

    def open(self, name: str) -> pa.NativeFile | io.BufferedReader:
        """A file to read from at any place; it must be there."""
        file = open_input(self.filesystem, self.path(name))
        # Arrow takes what one call of a Python file's `read` gives for all there is.
        return file if isinstance(file, pa.NativeFile) else io.BufferedReader(file)

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(self.path(name))

    def erase(self) -> None:
        """Delete the folder itself with all that is in it."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_dir(self.root)

    def drop_if_empty(self, name: str) -> None:
        """Remove a folder of a disk that holds nothing any more; for object stores see `drop_markers`."""
        if self.is_local:
            with contextlib.suppress(OSError):
                os.rmdir(self.path(name))

    def names(self, under: str = "") -> Iterator[str]:
        """Yield the relative names of all files below a folder, in no order; none where it is missing."""
        return (name for name, _ in self.changes(under))

    def changes(self, under: str = "") -> Iterator[tuple[str, datetime]]:
        """Yield each file's name, and when it was written."""
        base = self.path(under).rstrip("/")
        selector = pafs.FileSelector(base, recursive=True, allow_not_found=True)
        for info in self.filesystem.get_file_info(selector):
            if info.type == pafs.FileType.File:
                yield info.path[len(self.root) + 1 :], info.mtime

    def require_writable(self) -> None:
        """Raise ValueError unless a file can be put here and taken away."""
        probe = f"{PROBE}{uuid.uuid4().hex}"
        try:
            self.put(probe, b"")
            self.delete(probe)
        except OSError as error:
            raise ValueError(
                f"output must be a folder that can be written, got {self}: {error}; "
                "give another --output or the missing permission"
            ) from error
