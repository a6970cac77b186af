"""The caller of a request: set once by the check of keys, read by code that divides resources."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Caller:
    """A user of the service, who has a share of it."""

    name: str
    """Name of the key, or the address of a caller without one."""
    max_in_flight: int | None = None
    """Requests of this caller that one gateway serves at once; None sets no limit of its own."""
    may_send_batches: bool = True
    """Whether batch work is taken from this caller; keys need a right to it."""


ANYBODY = Caller(name="")

CALLER: ContextVar[Caller] = ContextVar("CALLER", default=ANYBODY)
"""The caller of the request that is being served."""
