"""Which calls have Serve's handshake. Apart from the router, whose module Serve pickles by value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_HAS_HANDSHAKE = ContextVar("_HAS_HANDSHAKE", default=False)


@contextmanager
def handshake() -> Iterator[None]:
    """Give the calls that begin in the block Serve's handshake, so that dead replicas cost no try."""
    token = _HAS_HANDSHAKE.set(True)
    try:
        yield
    finally:
        _HAS_HANDSHAKE.reset(token)


def has_handshake() -> bool:
    return _HAS_HANDSHAKE.get()
