"""`ImageLoader`: from addresses to encoded images, many at a time, with the reason for each that fails.

It runs in decoding actors, never in their sandboxed children. Web servers are asked through
`blip2_actor.fetch_image`, the one guard for URLs that others chose. Files of stores and disks are read like
every other input.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from urllib.parse import unquote

import pyarrow.fs as pafs

from blip2_actor import FetchError, FetchPolicy, Status
from pipeline.errors import InputError
from pipeline.fetching.fetch_settings import FetchSettings
from pipeline.fetching.hosts import Hosts
from pipeline.inputs.formats.addresses import is_web, scheme_of
from pipeline.inputs.formats.base64_text import decode_base64
from pipeline.inputs.formats.folder import Content, read_file
from pipeline.storage.filesystems import ARROW_SCHEMES, join, open_filesystem
from pipeline.storage.secrets import hide_secrets

NUM_THREADS = 16
"""Images that one loader loads at the same time; it holds as many in memory."""
TRUST = "; if you trust the host, give --allow-private-hosts to the job or to blip2 retry"
MAX_STORES = 64
"""Clients of stores that are kept."""


class ImageLoader:
    """Loads images for one process.

    Args:
        settings: how web servers are asked; None to refuse web addresses.
        max_file_bytes: a larger image is not loaded.
    """

    def __init__(self, settings: FetchSettings | None, max_file_bytes: int) -> None:
        self._max_file_bytes = max_file_bytes
        self._threads = ThreadPoolExecutor(NUM_THREADS, "load")
        self._store = lru_cache(MAX_STORES)(open_filesystem)
        self._hosts = None if settings is None else self._hosts_of(settings)

    def _hosts_of(self, settings: FetchSettings) -> Hosts:
        policy = FetchPolicy(
            max_bytes=self._max_file_bytes,
            timeout_s=settings.fetch_timeout_s,
            private_hosts=settings.allow_private_hosts,
        )
        return Hosts(policy, settings.fetch_per_host, settings.fetch_patience_s)

    def load(self, addresses: Iterable[str]) -> Iterator[Content]:
        """Yield for each address, in order, the encoded image, or why there is none."""
        ahead: deque[Future[Content]] = deque()
        try:
            for address in addresses:
                ahead.append(self._threads.submit(self._load, address))
                if len(ahead) == NUM_THREADS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _load(self, address: str) -> Content:
        if is_web(address):
            return self._fetch(address)
        if scheme_of(address) == "data":
            return _decode(address)
        try:
            filesystem, path = self._place(address)
            if isinstance(filesystem, pafs.LocalFileSystem) and not stat.S_ISREG(os.stat(path).st_mode):
                return None, Status.UNREADABLE, f"{address} must be a regular file"
            return read_file(filesystem, path, self._max_file_bytes)
        except (InputError, OSError, ValueError) as error:
            return None, Status.UNREADABLE, f"the file cannot be read: {hide_secrets(str(error))}"

    def _fetch(self, url: str) -> Content:
        if self._hosts is None:
            return None, Status.REFUSED, "the image is at a web address, and fetching is not switched on"
        try:
            image = self._hosts.fetch(url)
        except FetchError as error:
            return None, error.status, hide_secrets(str(error)) + (TRUST if error.reason == "address" else "")
        return (image, None, None) if image else (None, Status.MISSING_IMAGE, "the server sent no bytes")

    def _place(self, address: str) -> tuple[pafs.FileSystem, str]:
        """Return the filesystem of an address and the path in it. The images of a bucket share one client."""
        scheme = scheme_of(address)
        if scheme in ("", "file"):
            return open_filesystem(address)
        place, mark, options = address.partition("?")
        store, _, path = place.partition("://")[2].partition("/")
        filesystem, base = self._store(f"{scheme}://{store}{mark}{options}")
        return filesystem, join(base, unquote(path) if scheme in ARROW_SCHEMES else path)


def _decode(uri: str) -> Content:
    try:
        image = decode_base64(uri.encode())
    except ValueError as error:
        return None, Status.UNDECODABLE, str(error)
    return (image, None, None) if image else (None, Status.MISSING_IMAGE, "the data URI is empty")
