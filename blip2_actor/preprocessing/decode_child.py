"""The program a `DecodePool` starts: decodes images from its standard input, under limits, one by one.

    python -m blip2_actor.preprocessing.decode_child SIZE_PX LIMITS_AS_JSON

It may crash, hang or swell on hostile bytes; that is what it is for. It imports Pillow and the standard
library only, answers an image before it reads the next (so the first image without an answer is the one it
died on), and ends when its input does. The parent trusts none of its bytes: answers are plain structs.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
import warnings

from PIL import Image

from blip2_actor.preprocessing.images import DecodedImage, ImageLimits, decode_or_exhaust
from blip2_actor.status import Status

HELLO = b"\x06"
"""Written once, when all is imported: a death before it is nobody's fault but the installation's."""
REQUEST = struct.Struct("<Q")
"""Number of encoded bytes, which follow."""
REPLY = struct.Struct("<BIIHI")
"""Index into STATUSES, width, height (0 when unknown), bytes of UTF-8 error, bytes of pixels; both follow."""
STATUSES = tuple(Status)
OUT_OF_MEMORY = 76
"""Exit status of a child whose image needed more memory than `memory_bytes`."""
_INPUT_BUFFER_BYTES = 1 << 20


def main() -> None:
    size_px, limits = int(sys.argv[1]), ImageLimits(**json.loads(sys.argv[2]))
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    _restrict(limits)
    requests = os.fdopen(0, "rb", buffering=_INPUT_BUFFER_BYTES)
    _silence()
    replies.write(HELLO)
    try:
        while len(header := requests.read(REQUEST.size)) == REQUEST.size:
            data = requests.read(REQUEST.unpack(header)[0])
            replies.write(_pack(_decode_in_time(data, size_px, limits)))
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except BrokenPipeError:
        pass  # the parent is gone


def _silence() -> None:
    """Codecs comment on damaged bytes: on standard output that would pass for an answer, on standard error
    it would fill the caller's log."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _restrict(limits: ImageLimits) -> None:
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # max_pixels is the limit here
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
    for timer_signal in (
        signal.SIGPROF,
        signal.SIGALRM,
    ):  # the parent may have passed on that it ignores them
        signal.signal(timer_signal, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGPROF, signal.SIGALRM))


def _decode_in_time(data: bytes, size_px: int, limits: ImageLimits) -> DecodedImage:
    # Left at their defaults these signals end the process even when C code never returns to Python.
    signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)
    signal.setitimer(signal.ITIMER_REAL, limits.wall_s)
    image = decode_or_exhaust(data, size_px, limits)
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return image


def _pack(image: DecodedImage) -> bytes:
    error = (image.error or "").encode()
    pixels = image.pixels or b""
    header = REPLY.pack(
        STATUSES.index(image.status), image.width or 0, image.height or 0, len(error), len(pixels)
    )
    return b"".join((header, error, pixels))


if __name__ == "__main__":
    main()
