"""Files of web servers that cannot send a part of a file: each is sent once, into a temporary file.

The first request to a server asks for one byte. A server that answers with the whole file is not interrupted:
what it sends is the file. It stays on the disk of this machine until later ones need the room, so that its
digest, its footer and its rows cost one transfer in each process.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from fsspec.asyn import sync
from fsspec.spec import AbstractFileSystem

from pipeline.storage.spill import UnnamedFile

MAX_KEPT_BYTES = 4 << 30
"""Whole files that a process keeps, besides the last one and those that are open."""
CHUNK_BYTES = 1 << 20
SILENCE_S = 60.0
"""A large file may take hours, but not so long without a byte."""

Key = tuple[str, ...]


class WholeFile(io.RawIOBase):
    """One reader of a whole file; several share the file, each with a position of its own."""

    def __init__(self, file: UnnamedFile) -> None:
        self._file: UnnamedFile | None = file
        self.size = file.num_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._file is None:
            raise ValueError("this reader is closed")
        num_bytes = self._file.read_into(buffer, self._position)
        self._position += num_bytes
        return num_bytes

    def close(self) -> None:
        """Let the file go: it takes room on the disk until its last reader is closed."""
        self._file = None
        super().close()


class WholeFiles:
    """The whole files of this process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Key, UnnamedFile] = OrderedDict()
        self._fetching: WeakValueDictionary[Key, threading.Lock] = WeakValueDictionary()
        self._sends_parts: dict[str, bool] = {}

    def open(self, fs: AbstractFileSystem, url: str, must: bool = False) -> WholeFile | None:
        """Open a file whose server cannot send parts of it; return None if the server can.

        Args:
            fs: fsspec's filesystem for web servers.
            url: the file.
            must: fetch the file in any case, because the server has not sent the part that it was asked for.
        """
        host = urlsplit(url).netloc
        if must:
            self._sends_parts[host] = False
        elif self._sends_parts.get(host):
            return None
        info = fs.info(url)
        key = (url, *(str(info.get(name)) for name in ("size", "ETag", "Last-Modified")))
        with self._lock:
            fetching = self._fetching.setdefault(key, threading.Lock())
        with fetching:  # Others that want this file wait for it, and those that want another one do not.
            if (kept := self._reader(key)) is not None:
                return kept
            file = sync(fs.loop, _fetch_unless_parts, fs, url, must)
            self._sends_parts.setdefault(host, file is None)
            if file is None:
                return None
            with self._lock:
                self._kept[key] = file
                self._make_room()
                return WholeFile(file)

    def _reader(self, key: Key) -> WholeFile | None:
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return WholeFile(self._kept[key])

    def _make_room(self) -> None:
        sizes = [file.num_bytes for file in self._kept.values()]
        while len(sizes) > 1 and sum(sizes) > MAX_KEPT_BYTES:
            self._kept.popitem(last=False)
            del sizes[0]


async def _fetch_unless_parts(fs: AbstractFileSystem, url: str, must: bool) -> UnnamedFile | None:
    """Return the whole file, or None if the server sends the byte that it is asked for."""
    import aiohttp  # Only web servers need it; importing it takes long.

    session = await fs.set_session()
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
    options = dict(fs.kwargs)
    headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
    if not must:
        headers["Range"] = "bytes=0-0"
    async with session.get(fs.encode_url(url), headers=headers, timeout=timeout, **options) as response:
        if response.status in (206, 416):
            if must:
                raise OSError(f"the server answers a request for a whole file with HTTP {response.status}")
            return None
        fs._raise_not_found_for_status(response, url)
        file = UnnamedFile()
        async for chunk in response.content.iter_chunked(CHUNK_BYTES):
            file.append(chunk)
        return file


WHOLE_FILES = WholeFiles()
