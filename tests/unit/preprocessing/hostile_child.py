"""The real decoding child with one more image format, whose files do to it what they say.

A file is b"BM" (so that the BMP plugin would be asked) and the name of a deed below, with its arguments.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import os
import signal
import sys
import time
from pathlib import Path
from typing import IO

from PIL import BmpImagePlugin, Image

from blip2_actor.preprocessing import decode_child

PREFIX = b"BM"


def segfault() -> None:
    ctypes.string_at(0)


def leave() -> None:
    """Take a while to go after the pipe to the parent has been closed."""
    atexit.register(time.sleep, 0.2)
    sys.exit(3)


def spin() -> None:
    sum(itertools.repeat(0))  # inside C, where no Python signal handler would ever run


def sleep() -> None:
    time.sleep(3600)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def swell() -> None:
    hoard = [bytearray(1 << 24) for _ in itertools.count()]
    raise AssertionError(len(hoard))


def chatter() -> None:
    print("x" * 100_000, flush=True)
    print("x" * 100_000, file=sys.stderr, flush=True)


def babble() -> None:
    """Write what is no answer to the parent, wherever its pipe may be."""
    for fd in range(3, 20):
        try:
            os.write(fd, b"\xff" * 64)
        except OSError:
            pass
    time.sleep(3600)


def segfault_once(marker: str) -> None:
    if not Path(marker).exists():
        Path(marker).touch()
        segfault()


def tell_pid(fifo: str) -> None:
    Path(fifo).write_text(str(os.getpid()))


DEEDS = {
    deed.__name__: deed
    for deed in (segfault, leave, spin, sleep, stop, swell, chatter, babble, segfault_once, tell_pid)
}


def open_hostile(fp: IO[bytes], filename: str | bytes) -> Image.Image:
    name, *arguments = fp.read().removeprefix(PREFIX).decode("latin-1").split()
    if name not in DEEDS:
        fp.seek(0)
        return BmpImagePlugin.BmpImageFile(fp, filename)
    DEEDS[name](*arguments)
    return Image.new("RGB", (8, 8), "white")


def is_bmp(prefix: bytes) -> bool:
    return prefix.startswith(PREFIX)


if __name__ == "__main__":
    Image.preinit()
    Image.register_open("BMP", open_hostile, is_bmp)  # type: ignore[arg-type]
    decode_child.main()
