"""A web server with one tar of any size, whose bytes are generated on request: it needs no disk.

python -m benchmarks.growth.generated_tar 10_000_000_000     # prints the URL, serves until its input ends
"""

from __future__ import annotations

import io
import sys
import tarfile
import threading
from bisect import bisect_right
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from typing import Any

import numpy as np
from PIL import Image

SIDE_PX = 512
NUM_PICTURES = 4
END = bytes(2 * tarfile.BLOCKSIZE)


class GeneratedTar:
    """The bytes of a tar whose members are a few JPEGs repeated under new names.

    Args:
        num_bytes: the minimum size of the tar; it ends with a whole member.
    """

    def __init__(self, num_bytes: int) -> None:
        self._pictures = [_jpeg(seed) for seed in range(NUM_PICTURES)]
        self._starts = [0, *accumulate(tarfile.BLOCKSIZE + len(_padded(p)) for p in self._pictures)]
        """The start of each member within a round of all pictures, and the start of the next round."""
        self.num_images = NUM_PICTURES * -(-num_bytes // self._starts[-1])
        self.size = self._start_of(self.num_images) + len(END)

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from `start` up to `stop`, in pieces."""
        rounds, rest = divmod(start, self._starts[-1])
        number = rounds * NUM_PICTURES + bisect_right(self._starts, rest) - 1
        while start < stop:
            piece = self._member(number) if number < self.num_images else END
            first = self._start_of(min(number, self.num_images))
            yield piece[start - first : stop - first]
            start = first + len(piece)
            number += 1

    def _start_of(self, number: int) -> int:
        rounds, picture = divmod(number, NUM_PICTURES)
        return rounds * self._starts[-1] + self._starts[picture]

    def _member(self, number: int) -> bytes:
        picture = self._pictures[number % NUM_PICTURES]
        header = tarfile.TarInfo(f"{number:09d}.jpg")
        header.size = len(picture)
        return header.tobuf(tarfile.USTAR_FORMAT) + _padded(picture)


class TarServer(ThreadingHTTPServer):
    """Serves a generated tar on loopback, whole or in ranges, in its own thread until closed."""

    daemon_threads = True

    def __init__(self, tar: GeneratedTar) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.tar = tar
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/large.tar"

    def server_close(self) -> None:
        self.shutdown()
        super().server_close()


class _Handler(BaseHTTPRequestHandler):
    server: TarServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def _answer(self, has_body: bool) -> None:
        tar = self.server.tar
        start, stop = 0, tar.size
        asked = self.headers.get("Range")
        if asked is not None:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(tar.size, int(last) + 1 if last else tar.size)
        self.send_response(200 if asked is None else 206)
        if asked is not None:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{tar.size}")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{tar.size}"')
        self.end_headers()
        if has_body:
            for piece in tar.read(start, stop):
                self.wfile.write(piece)

    def log_message(self, *arguments: Any) -> None:
        pass


def _jpeg(seed: int) -> bytes:
    """Return a picture that JPEG cannot compress well."""
    content = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    Image.fromarray(noise).save(content, "JPEG", quality=95, subsampling=0)
    return content.getvalue()


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % tarfile.BLOCKSIZE)


def main() -> None:
    server = TarServer(GeneratedTar(int(sys.argv[1])))
    print(server.url, server.tar.num_images, server.tar.size, flush=True)
    sys.stdin.read()
    server.server_close()


if __name__ == "__main__":
    main()
