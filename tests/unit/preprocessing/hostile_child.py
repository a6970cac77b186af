"""The real decoding child with one more image format, in which files name an attack.

    python hostile_child.py FOLDER SIZE_PX LIMITS_AS_JSON

A file is b"BM" (so that Pillow opens it as BMP), the name of an attack below or of an escape (`escapes`), and
its arguments. The children count their starts in FOLDER, because nothing else survives a child.
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

from blip2_actor.preprocessing import decode_child, formats
from tests.unit.preprocessing.escapes import ESCAPES

PREFIX = b"BM"
START = 0
"""Return how many children have been started, including this one."""


def segfault() -> None:
    ctypes.string_at(0)


def leave() -> None:
    """Exit some time after the pipe to the parent has been closed."""
    atexit.register(time.sleep, 0.2)
    sys.exit(3)


def spin() -> None:
    sum(itertools.repeat(0))  # in C code, where no Python signal handler ever runs


def sleep() -> None:
    time.sleep(3600)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def use_up_memory() -> None:
    blocks = [bytearray(1 << 24) for _ in itertools.count()]
    raise AssertionError(len(blocks))


def print_much() -> None:
    print("x" * 100_000, flush=True)
    print("x" * 100_000, file=sys.stderr, flush=True)


def write_garbage() -> None:
    """Write bytes that are no reply to every open file, one of which is the pipe to the parent."""
    for fd in range(3, 20):
        try:
            os.write(fd, b"\xff" * 64)
        except OSError:
            pass
    time.sleep(3600)


def segfault_before(start: str) -> None:
    if int(start) > START:
        segfault()


def tell_pid() -> None:
    raise ValueError(f"pid {os.getpid()}")


ATTACKS = {
    attack.__name__: attack
    for attack in (
        segfault,
        leave,
        spin,
        sleep,
        stop,
        use_up_memory,
        print_much,
        write_garbage,
        segfault_before,
        tell_pid,
    )
} | ESCAPES


def count_starts(folder: Path) -> int:
    with open(folder / "starts", "ab", buffering=0) as starts:
        starts.write(b".")
        return starts.tell()


def open_hostile(fp: IO[bytes], filename: str | bytes) -> Image.Image:
    name, *arguments = fp.read().removeprefix(PREFIX).decode("latin-1").split()
    if name not in ATTACKS:
        fp.seek(0)
        return BmpImagePlugin.BmpImageFile(fp, filename)
    ATTACKS[name](*arguments)
    return Image.new("RGB", (8, 8), "white")


def is_bmp(prefix: bytes) -> bool:
    return prefix.startswith(PREFIX)


if __name__ == "__main__":
    START = count_starts(Path(sys.argv.pop(1)))
    formats.prepare_for_sandbox()
    Image.register_open("BMP", open_hostile, is_bmp)  # type: ignore[arg-type]  # Pillow asks for an ImageFile
    decode_child.main()
