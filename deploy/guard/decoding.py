"""Image decoding for many callers: small pictures ahead, large ones one at a time, callers in turn.

A picture of 89 million pixels is legal, needs 4 CPU-seconds and a gigabyte, and compresses to 700 kB. Eight
of them must not take all decoding processes, nor eight gigabytes: large ones have one process between them.
"""

from __future__ import annotations

import asyncio
import dataclasses
from concurrent.futures import ThreadPoolExecutor

from blip2_actor import DecodedImage, DecodePool, ImageLimits, SandboxReport, Status
from deploy.guard.callers import CALLER
from deploy.guard.fair_gate import FairGate
from deploy.guard.image_header import claimed_pixels

SMALL_PIXELS = 1 << 20
"""Pictures up to this size always find a process free of larger ones, if there are at least two."""
LARGE_PIXELS = 16 << 20
"""Pictures above this size, which is beyond most telephones, are decoded one at a time."""
LARGE_NICENESS = 5
"""With this niceness, a large picture gets a third of the CPU time of any other busy process. With more, it
would not be ready within `wall_s` on a busy machine."""


class Decoding:
    """Decoding processes of one gateway: `num_children` for most pictures, and one for large ones."""

    def __init__(self, size_px: int, limits: ImageLimits, num_children: int) -> None:
        usual = dataclasses.replace(limits, max_pixels=min(LARGE_PIXELS, limits.max_pixels))
        self._usual = _Lane(size_px, usual, num_children)
        self._large = _Lane(size_px, limits, 1, LARGE_NICENESS)
        self._max_pixels = limits.max_pixels
        self._usual.start()

    async def decode(self, image: bytes) -> DecodedImage:
        """Wait for a process, and decode untrusted bytes in it."""
        claimed = claimed_pixels(image)
        is_above_limit = claimed is not None and claimed > self._max_pixels
        if claimed is None or claimed <= LARGE_PIXELS or is_above_limit:
            # A picture whose header claims too many pixels is refused at once.
            decoded = await self._usual.decode(image, min(claimed or LARGE_PIXELS, LARGE_PIXELS))
            if decoded.status is not Status.TOO_LARGE:
                return decoded
            if is_above_limit:
                error = f"the image has {claimed} pixels, more than max_pixels ({self._max_pixels})"
                return dataclasses.replace(decoded, error=error)  # the original names the limit of this lane
        return await self._large.decode(image, claimed or self._max_pixels)

    def sandbox_report(self) -> SandboxReport:
        """Say which protections are in force around the decoding processes."""
        return self._usual.sandbox_report()

    def close(self) -> None:
        self._usual.close()
        self._large.close()


class DecodingBySize:
    """Decoding processes for each size of image that the models take; they start when a model needs them."""

    def __init__(self, limits: ImageLimits, num_children: int) -> None:
        self._limits = limits
        self._num_children = num_children
        self._by_size: dict[int, Decoding] = {}

    def of(self, size_px: int) -> Decoding:
        if size_px not in self._by_size:
            self._by_size[size_px] = Decoding(size_px, self._limits, self._num_children)
        return self._by_size[size_px]

    def close(self) -> None:
        for decoding in self._by_size.values():
            decoding.close()


class _Lane:
    """A pool of processes and the line before it."""

    def __init__(self, size_px: int, limits: ImageLimits, num_children: int, niceness: int = 0) -> None:
        self._pool = DecodePool(size_px, limits, num_children, niceness=niceness)
        self._threads = ThreadPoolExecutor(num_children, "decode")
        self._gate = FairGate(num_children, small_work=SMALL_PIXELS, kept_for_small=int(num_children > 1))
        self._num_children = num_children

    def start(self) -> None:
        """Start the processes now; otherwise they start when they are first needed."""
        self._pool.decode([b"-"] * self._num_children)

    def sandbox_report(self) -> SandboxReport:
        return self._pool.sandbox_report()

    async def decode(self, image: bytes, pixels: int) -> DecodedImage:
        leave = await self._gate.enter(1, pixels, CALLER.get().name)
        call = asyncio.get_running_loop().run_in_executor(self._threads, self._pool.decode, [image])
        # The process is busy until the picture is done, even if the caller has left.
        call.add_done_callback(lambda _: leave())
        [decoded] = await asyncio.shield(call)
        return decoded

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._pool.close()
