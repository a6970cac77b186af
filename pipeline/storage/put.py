"""Write a file in one step, so that it is there as a whole or not at all; also only if there is none.

A disk gets a finished file under its name by a rename. In an object store one PUT does the same. Any other
filesystem, such as that of a file server, shows a file while it is written: there a finished one is moved.

Of two drivers that start together, one gets the lease: a disk links a finished file to its name unless there
is one. Object stores take a condition with the request, which pyarrow cannot send; the filesystem of fsspec
for the same store can.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from functools import lru_cache
from typing import IO

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.storage.fsspec_errors import HandlerWithOSErrors, oserrors
from pipeline.storage.fsspec_store import fsspec_store

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "hf"}
"""What Arrow or fsspec calls the stores in which a file is there when its upload is complete."""
COPY_BYTES = 8 << 20
PART_BYTES = 10 << 20
"""What Arrow uploads to S3 as one part; less becomes one PUT."""


def is_object_store(filesystem: pafs.FileSystem) -> bool:
    """Return whether a file is there as a whole or not at all, even if its writer dies."""
    if not isinstance(filesystem, pafs.PyFileSystem):
        return filesystem.type_name in OBJECT_STORES
    handler = filesystem.handler
    protocols = handler.fs.protocol if isinstance(handler, HandlerWithOSErrors) else ()
    return not OBJECT_STORES.isdisjoint([protocols] if isinstance(protocols, str) else protocols)


def put(uri: str, filesystem: pafs.FileSystem, path: str, aside: str, content: bytes | IO[bytes]) -> None:
    """Write or replace a file.

    Args:
        uri: of the folder, with the credentials and options by which `filesystem` was opened.
        path: in the filesystem.
        aside: path of a temporary file on the same disk.
    """
    if isinstance(filesystem, pafs.LocalFileSystem):
        _rename(path, aside, content)
    elif is_object_store(filesystem):
        is_large = isinstance(filesystem, pafs.S3FileSystem) and _size_of(content) >= PART_BYTES
        _write(_s3_for_uploads(uri) if is_large else filesystem, path, content)
    else:
        _move(filesystem, path, aside, content)


def put_new(uri: str, filesystem: pafs.FileSystem, path: str, aside: str, content: bytes) -> bool:
    """Write a file unless there is one.

    Args:
        uri: of the folder, with the credentials and options by which `filesystem` was opened.
        path: in the filesystem.
        aside: path of a temporary file on the same disk.

    Returns:
        Whether it was written; also False if there is no way to say the condition to this store.
    """
    if isinstance(filesystem, pafs.LocalFileSystem):
        return _link(path, aside, content)
    if not is_object_store(filesystem):
        return False
    try:
        store = fsspec_store(uri, filesystem)
    except ImportError:
        return False
    if store is None:
        return False
    try:
        with oserrors():
            store.pipe_file(path, content, mode="create")
    except (OSError, TypeError, NotImplementedError):
        return False  # There is one, or the store or its package does not know the condition.
    return True


def _rename(path: str, aside: str, content: bytes | IO[bytes]) -> None:
    for attempt in (1, 2):
        try:
            _write_aside(path, aside, content)
            os.replace(aside, path)
            return
        except FileNotFoundError:
            # Another process removed the empty folder between makedirs and its use here.
            if attempt == 2:
                raise
        except OSError:
            with contextlib.suppress(FileNotFoundError):
                os.remove(aside)
            raise


def _write_aside(path: str, aside: str, content: bytes | IO[bytes]) -> None:
    """Write a finished file, which waits for its name, to the disk; make the folders of both."""
    for each in (aside, path):
        os.makedirs(os.path.dirname(each), exist_ok=True)
    with open(aside, "wb") as file:
        _copy(content, file)
        file.flush()
        os.fsync(file.fileno())


def _move(filesystem: pafs.FileSystem, path: str, aside: str, content: bytes | IO[bytes]) -> None:
    try:
        try:
            _write(filesystem, aside, content)
        except FileNotFoundError:
            filesystem.create_dir(os.path.dirname(aside), recursive=True)
            _write(filesystem, aside, content)
        try:
            filesystem.move(aside, path)
        except FileNotFoundError:
            filesystem.create_dir(os.path.dirname(path), recursive=True)
            filesystem.move(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            filesystem.delete_file(aside)
        raise


def _write(filesystem: pafs.FileSystem, path: str, content: bytes | IO[bytes]) -> None:
    # In an object store, its close makes a PUT, or a multipart upload that exists when it is complete. It
    # also closes after an error, so the content must be at hand: only the store itself can fail here.
    with filesystem.open_output_stream(path, compression=None) as stream:
        _copy(content, stream)


@lru_cache
def _s3_for_uploads(uri: str) -> pafs.FileSystem:
    """Return a filesystem of S3 that begins the upload of a file when it is opened.

    That of a `Folder` begins it when the first part is full, and if this fails, its close makes an object of
    that part alone.
    """
    return pafs.FileSystem.from_uri(uri)[0]


def _size_of(content: bytes | IO[bytes]) -> int:
    return content.seek(0, os.SEEK_END) if hasattr(content, "seek") else len(content)


def _copy(content: bytes | IO[bytes], target: IO[bytes] | pa.NativeFile) -> None:
    if isinstance(content, (bytes, pa.Buffer)):
        target.write(content)
    else:
        content.seek(0)
        shutil.copyfileobj(content, target, COPY_BYTES)


def _link(path: str, aside: str, content: bytes) -> bool:
    try:
        _write_aside(path, aside, content)
        os.link(aside, path)
    except OSError:  # There is one, there are no links, or nothing can be written, which the next write says.
        return False
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(aside)
    return True
