"""Keys of the callers: a file of names and hashes, read again when it changes.

    python -m deploy.guard.keys alice >> keys.txt      # prints the key itself on the terminal, once

A line is `NAME SHA256 [MAX_IN_FLIGHT] [batch]`, and `#` begins a comment; `batch` is the right to send batch
work. A name may have several lines, so that a new key can be handed out before the old one is taken away. A
key is 256 random bits, so its plain hash does not reveal it.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import sys
import time
from pathlib import Path

from blip2_actor.flags import Parser
from deploy.guard.callers import Caller

PROG = "python -m deploy.guard.keys"
READ_AGAIN_AFTER_S = 1.0
BATCH = "batch"
"""Word at the end of a line: the key may send batch work."""

_NAME = r"[A-Za-z0-9._@-]{1,64}"
_LINE = re.compile(rf"({_NAME}) ([0-9a-f]{{64}})(?: (0*[1-9][0-9]*))?(?: ({BATCH}))?")

logger = logging.getLogger("ray.serve")


class KeyFile:
    """The callers of a key file, as the file is now."""

    def __init__(self, path: str) -> None:
        """Read the file.

        Raises:
            OSError: it cannot be read.
            ValueError: it has a wrong line, or no key.
        """
        self._path = Path(path)
        self._changed = _change_of(self._path)
        self._callers = read_keys(self._path)
        self._looked_at_s = time.monotonic()

    def caller_of(self, key: str) -> Caller | None:
        """Return who has the key, or None; takes the same time whichever characters are right."""
        self._read_again()
        digest = hashlib.sha256(key.encode()).hexdigest()
        found = None
        for known, caller in self._callers:
            if hmac.compare_digest(known, digest):
                found = caller
        return found

    def _read_again(self) -> None:
        now_s = time.monotonic()
        if now_s - self._looked_at_s < READ_AGAIN_AFTER_S:
            return
        self._looked_at_s = now_s
        try:
            changed = _change_of(self._path)
            if changed != self._changed:
                self._callers = read_keys(self._path)
                self._changed = changed
        except (OSError, ValueError) as error:
            logger.error("The keys stay as they were, because the file cannot be read again: %s", error)


def read_keys(path: Path) -> list[tuple[str, Caller]]:
    """Return hashes and callers.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is wrong, or there is no key.
    """
    keys = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.partition("#")[0].split()
        if words:
            keys.append(_key(" ".join(words), f"line {number} of {path}"))
    if not keys:
        raise ValueError(f"{path} must have a key, got none; add one with: {PROG} NAME >> {path}")
    return keys


def _key(line: str, where: str) -> tuple[str, Caller]:
    found = _LINE.fullmatch(line)
    if found is None:
        # The line is not shown: it may hold a key instead of its hash.
        raise ValueError(f"{where} must be NAME SHA256 [MAX_IN_FLIGHT] [batch]; make one with: {PROG} NAME")
    name, digest, quota, batch = found.groups()
    max_in_flight = None if quota is None else int(quota)
    return digest, Caller(name=name, max_in_flight=max_in_flight, may_send_batches=batch is not None)


def _change_of(path: Path) -> tuple[int, int, int]:
    now = os.stat(path)
    return now.st_mtime_ns, now.st_size, now.st_ino


def main(argv: list[str] | None = None) -> int:
    """Print the line of a new key on stdout, and the key itself on stderr."""
    parser = Parser(prog=PROG, description="Make a key for the endpoint; append the output to the key file.")
    parser.add_argument("name", metavar="NAME", help="who gets the key")
    parser.add_argument(
        "--max-in-flight",
        type=int,
        metavar="N",
        help="requests of this name that a gateway serves at once; default: half of the gateway's own limit",
    )
    parser.add_argument(
        "--batch", action="store_true", help="also take batch work from this name (blip2 caption --endpoint)"
    )
    given = parser.parse_args(argv)
    if not re.fullmatch(_NAME, given.name):
        parser.error(
            f"NAME must be at most 64 letters, digits and the characters . _ @ -, got {given.name!r}"
        )
    if given.max_in_flight is not None and given.max_in_flight < 1:
        parser.error(f"--max-in-flight must be at least 1, got {given.max_in_flight}")
    key = secrets.token_urlsafe(32)
    quota = "" if given.max_in_flight is None else f" {given.max_in_flight}"
    right = f" {BATCH}" if given.batch else ""
    sys.stdout.write(f"{given.name} {hashlib.sha256(key.encode()).hexdigest()}{quota}{right}\n")
    sys.stderr.write(f"the key of {given.name}, shown only now: {key}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
