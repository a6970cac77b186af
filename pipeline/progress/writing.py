"""Write to a stream of this process, whatever it can take."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from typing import TextIO

READER_GONE = (errno.EPIPE, errno.EIO)
"""Errors of a pipe whose reader has ended, and of a terminal that is closed."""
DUMB = ("dumb", "unknown")
"""Terminals that know no escape codes."""

_lost: OSError | None = None


def lost_output() -> OSError | None:
    """Return why standard output has taken nothing more, such as a full disk; None while its reader is there,
    or has gone."""
    return _lost


def write(stream: TextIO | None, text: str) -> bool:
    """Write a text for people, whatever the stream can take; return whether anybody may read it.

    Characters that its encoding lacks are replaced. A stream whose reader has gone (`| head`, a closed
    terminal) takes nothing from then on: what a job makes is in its files, and so the job goes on. Neither
    does one that cannot be written, which `lost_output` tells.
    """
    global _lost
    if stream is None:  # Python was started without it
        return False
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            plain = text.replace("·", "|").replace("…", "...")
            stream.write(plain.encode("ascii", "backslashreplace").decode())
        stream.flush()
    except OSError as error:
        if stream is sys.stdout and error.errno not in READER_GONE:
            _lost = error
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
        return False
    return True


def leave_live_area() -> None:
    """Begin a line and show the cursor, in a process that ends without closing its `LiveArea`."""
    if os.isatty(1) and os.environ.get("TERM") not in DUMB:
        os.write(1, b"\n\x1b[?25h")


def columns(stream: TextIO | None) -> int:
    """Return the width of a terminal as it is now."""
    try:
        columns = 0 if stream is None else os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # not a terminal of the system
        columns = 0
    return columns or shutil.get_terminal_size().columns
