"""Files that a command writes on this machine for people, such as a page."""

from __future__ import annotations

import os
from pathlib import Path


def result_file(name: str, given: str) -> Path:
    """Return the path of a file that is written after long work, if it can be written.

    Args:
        name: the setting that names the file, for messages.
        given: its value; `~` is the home folder.

    Raises:
        ValueError: it is a folder, is in none that exists, or may not be written.
    """
    if not given:
        raise ValueError(f"{name} must be the name of a file, got an empty one; name a file, or leave it out")
    path = Path(os.path.expanduser(given))
    if path.is_dir():
        raise ValueError(f"{name} must be a file, got the folder {given}; name a file in it")
    if not path.parent.is_dir():
        raise ValueError(
            f"{name} must be a file in a folder of this machine, got {given}; make the folder {path.parent}, "
            "or name another file"
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(
            f"{name} must be a file that can be written, got {given}; name another file, or give the missing "
            "permission"
        )
    return path
