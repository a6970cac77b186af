"""Write a file only if there is none, in one step: of two drivers that start together, one gets the lease.

A disk links a finished file to its name. Object stores take a condition with the request, which pyarrow
cannot send; the filesystem of fsspec for the same store can.
"""

from __future__ import annotations

import contextlib
import os

import pyarrow.fs as pafs

from pipeline.storage.fsspec_errors import oserrors
from pipeline.storage.fsspec_store import fsspec_store


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


def _link(path: str, aside: str, content: bytes) -> bool:
    for each in (path, aside):
        os.makedirs(os.path.dirname(each), exist_ok=True)
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(aside, path)
    except OSError:  # There is one, or the file system has no links.
        return False
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(aside)
    return True
