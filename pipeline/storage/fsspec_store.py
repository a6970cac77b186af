"""The store of a URI as fsspec's filesystem, for what Arrow's cannot ask.

Arrow cannot write on a condition, it asks for the size of an object before it reads it, and it deletes one
object a request. The filesystems of fsspec can do better, with the credentials and the server that Arrow
would take: that of Azure is used anyway, those of S3 and Google Cloud Storage if they are installed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import fsspec
import pyarrow.fs as pafs

from pipeline.storage.fsspec_errors import HandlerWithOSErrors
from pipeline.storage.secrets import hide_secrets

T = TypeVar("T")
KNOWN_OPTIONS = {"region", "scheme", "endpoint_override", "allow_bucket_creation", "retry_limit_seconds"}
"""Options of URIs that are understood here, or mean nothing to one small file."""
DELETED_AT_ONCE = 1000
"""The most objects that S3 deletes in one request."""
ONE_TRY = {"connect_timeout": 3, "read_timeout": 10, "retries": {"max_attempts": 0}}
"""Options of botocore for `S3Requests`, instead of which Arrow can ask again."""

logger = logging.getLogger(__name__)


def fsspec_store(uri: str, filesystem: pafs.FileSystem, config: Mapping[str, Any] = {}) -> Any:
    """Return the filesystem of fsspec for the same place, or None.

    Args:
        uri: with the credentials and options by which `filesystem` was opened.
        config: options of botocore for S3; without them, its own limits of time and tries.

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
        named: dict[str, Any] = {
            "client_kwargs": {"region_name": options.get("region") or filesystem.region},
            "config_kwargs": {**config} | ({"s3": {"addressing_style": "path"}} if server else {}),
            "max_concurrency": 1,  # With more, it asks for the size of an object before it reads it.
        }
        if server:
            named["endpoint_url"] = server
        if parts.username:
            named |= {"key": unquote(parts.username), "secret": unquote(parts.password or "")}
        return fsspec.filesystem("s3", skip_instance_cache=True, **named)
    if parts.scheme in ("gs", "gcs"):
        token = "anon" if parts.username == "anonymous" else "google_default"
        return fsspec.filesystem("gs", skip_instance_cache=True, token=token, endpoint_url=server)
    return None


class S3Requests:
    """Requests to S3 of which Arrow makes several; whoever gets None or False must ask Arrow.

    So it is for another store, without the package s3fs, and after the first request of its kind that has
    failed in this process: Arrow's requests are repeated, and their errors have the usual words. Thread-safe.
    """

    def __init__(self, uri: str) -> None:
        """Prepare requests; `s3_requests` keeps them for a process.

        Args:
            uri: of a folder, with its credentials and options.
        """
        self._uri = uri
        self._lock = threading.Lock()
        self._store: Any = None
        self._failed: set[str] = set()

    def get(self, filesystem: pafs.FileSystem, path: str) -> bytes | None:
        """Return the content of an object by one request."""
        return self._ask("read", filesystem, lambda store: store.cat_file(path))

    def delete(self, filesystem: pafs.FileSystem, paths: Sequence[str]) -> bool:
        """Delete objects of one bucket, a thousand in one request; those that are gone do not matter."""

        def delete(store: Any) -> bool:
            bucket = paths[0].partition("/")[0]
            for start in range(0, len(paths), DELETED_AT_ONCE):
                keys = [path.partition("/")[2] for path in paths[start : start + DELETED_AT_ONCE]]
                asked = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
                if errors := store.call_s3("delete_objects", Bucket=bucket, Delete=asked).get("Errors"):
                    raise OSError(f"{len(errors)} objects were not deleted, the first: {errors[0]}")
            return True

        return bool(self._ask("delete", filesystem, delete))

    def _ask(self, kind: str, filesystem: pafs.FileSystem, request: Callable[[Any], T]) -> T | None:
        if kind in self._failed or not isinstance(filesystem, pafs.S3FileSystem):
            return None
        try:
            with self._lock:
                self._store = self._store or fsspec_store(self._uri, filesystem, ONE_TRY)
            return None if self._store is None else request(self._store)
        except FileNotFoundError:
            return None
        except Exception as error:  # Whatever it is, Arrow can ask.
            self._failed.add(kind)
            reason = hide_secrets(str(error)) or type(error).__name__
            logger.info("Arrow makes the requests to %s objects from now on: %s", kind, reason)
            return None


@lru_cache
def s3_requests(uri: str) -> S3Requests:
    """Return the requests of this process to the store of a URI."""
    return S3Requests(uri)
