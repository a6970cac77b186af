"""Which calls have Serve's handshake; not in the router's module, because Serve pickles that by value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_HAS_HANDSHAKE = ContextVar("_HAS_HANDSHAKE", default=False)


@contextmanager
def handshake() -> Iterator[None]:
    """Give calls that begin in the block Serve's handshake, so that dead replicas do not use up a try."""
    token = _HAS_HANDSHAKE.set(True)
    try:
        yield
    finally:
        _HAS_HANDSHAKE.reset(token)


def has_handshake() -> bool:
    return _HAS_HANDSHAKE.get()
