"""The driver's work for a folder of many images, whose names are made up when the folder is listed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.growth.driver_books import DriverBooks

NAMINGS = ("numbered", "random")
STRIDE = 7_368_787
"""A prime: its multiples reach every number below a power of ten once, unordered, as a disk lists them."""


class FolderBooks(DriverBooks):
    """The work of a driver in a process in which one folder seems to hold many images.

    Args:
        folder: an empty folder on the disk.
        num_images: a power of ten.
        naming: "numbered" names follow each other when they are sorted; "random" ones have 128 random bits.
    """

    def __init__(self, folder: str, num_images: int, naming: str) -> None:
        super().__init__()
        scan = os.scandir

        def scandir(path: Any = ".") -> Any:
            if os.fspath(path).rstrip("/") == folder:
                return _entries(num_images, naming)
            return scan(path)

        os.scandir = scandir


class _Entry:
    def __init__(self, name: str) -> None:
        self.name = name

    def is_symlink(self) -> bool:
        return False

    def is_dir(self) -> bool:
        return False

    def is_file(self) -> bool:
        return True


@contextmanager
def _entries(num_images: int, naming: str) -> Iterator[Iterator[_Entry]]:
    numbers = (count * STRIDE % num_images for count in range(num_images))
    if naming == "numbered":
        yield (_Entry(f"{number:09d}.jpg") for number in numbers)
    else:
        yield (_Entry(f"{hashlib.md5(b'%d' % number).hexdigest()}.jpg") for number in numbers)
