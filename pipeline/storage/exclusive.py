"""Write a file only if there is none, in one step: of two drivers that start together, one gets the lease.

A disk links a finished file to its name. Object stores take a condition with the request, which pyarrow
cannot send. The filesystems of fsspec can, with the credentials and the server that pyarrow would take: that
of Azure is used anyway, those of S3 and Google Cloud Storage if they are installed.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import fsspec
import pyarrow.fs as pafs

from pipeline.storage.fsspec_errors import HandlerWithOSErrors, oserrors

KNOWN_OPTIONS = {"region", "scheme", "endpoint_override", "allow_bucket_creation", "retry_limit_seconds"}
"""Options of URIs that are understood here, or mean nothing to one small file."""


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
        store = _store_of(uri, filesystem)
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


def _store_of(uri: str, filesystem: pafs.FileSystem) -> Any:
    """Return the filesystem of fsspec for the same place, or None.

    Raises:
        ImportError: its package is not installed.
    """
    if isinstance(filesystem, pafs.PyFileSystem):
        handler = filesystem.handler
        return handler.fs if isinstance(handler, HandlerWithOSErrors) else None
    parts = urlsplit(uri)
    options = dict(parse_qsl(parts.query))
    if options.keys() - KNOWN_OPTIONS:
        return None
    server = options.get("endpoint_override")
    server = f"{options.get('scheme', 'https')}://{server}" if server and "://" not in server else server
    if parts.scheme == "s3":
        named: dict[str, Any] = {"client_kwargs": {"region_name": options.get("region")}}
        if server:
            named |= {"endpoint_url": server, "config_kwargs": {"s3": {"addressing_style": "path"}}}
        if parts.username:
            named |= {"key": unquote(parts.username), "secret": unquote(parts.password or "")}
        return fsspec.filesystem("s3", skip_instance_cache=True, **named)
    if parts.scheme in ("gs", "gcs"):
        token = "anon" if parts.username == "anonymous" else "google_default"
        return fsspec.filesystem("gs", skip_instance_cache=True, token=token, endpoint_url=server)
    return None
