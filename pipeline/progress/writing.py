"""Write to a stream of this process, whatever it can take."""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from typing import TextIO

from pipeline.progress.wording import escaped

READER_GONE = (errno.EPIPE, errno.EIO)
"""Errors of a pipe whose reader has ended, and of a terminal that is closed."""
DUMB = ("dumb", "unknown")
"""Terminals that know no escape codes."""
_SURROGATE = re.compile("[\ud800-\udfff]+")
"""Bytes of a file name that are not UTF-8, as Python holds them."""
_NOT_ASCII = re.compile("[^\x00-\x7f]+")

_lost: OSError | None = None
_is_read = True


def open_missing_streams() -> None:
    """Open the null device in place of each standard stream that the process was started without (`2>&-`).

    Else the next file gets the number of the stream, and what native code prints is written to it.
    """
    global _is_read
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number: this one
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
            _is_read = _is_read and name != "stdout"


def lost_output() -> OSError | None:
    """Return why standard output has taken nothing more, such as a full disk; None while its reader is there,
    or has gone."""
    return _lost


def is_read() -> bool:
    """Return whether standard output takes what is written; it may be closed, full, or without its reader."""
    return _is_read


def write(stream: TextIO | None, text: str) -> bool:
    """Write a text for people, whatever the stream can take; return whether anybody may read it.

    Characters that its encoding lacks are replaced. A stream whose reader has gone (`| head`, a closed
    terminal) takes nothing from then on: what a job makes is in its files, and so the job goes on. Neither
    does one that cannot be written, which `lost_output` tells.
    """
    global _lost, _is_read
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
        if stream is sys.stdout:
            _is_read = False
            _lost = _lost if error.errno in READER_GONE else error
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
        return False
    return True


def write_json(text: str) -> bool:
    """Write JSON and a line end to standard output; return what `write` returns.

    Characters that its encoding lacks, or that a terminal obeys, become escapes of JSON: those of `write` are
    for people, and no parser reads them.
    """
    return _write_document(text, lambda characters: json.dumps(characters)[1:-1])


def write_toml(text: str) -> bool:
    """Write TOML like `write_json`, with the escapes of TOML."""
    return _write_document(text, lambda characters: "".join(f"\\U{ord(each):08X}" for each in characters))


def _write_document(text: str, escape: Callable[[str], str]) -> bool:
    is_utf8 = codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name == "utf-8"
    lacking = _SURROGATE if is_utf8 else _NOT_ASCII
    plain = lacking.sub(lambda found: escape(found[0]), escaped(text, keep="\n"))
    return write(sys.stdout, plain + "\n")


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
