"""`EngineFault`: the engine itself has failed, which is the fault of no row.

The rule: a bad image or text is a `Result` with a status. Whatever the engine raises instead means that the
engine or its device can no longer be trusted; the process that holds it should exit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.endpoint.waiting import GivenUp


class EngineFault(RuntimeError):
    """The engine or its device has failed, and every request with it; the process should exit."""

    @classmethod
    def of(cls, error: BaseException) -> EngineFault:
        """Describe what the engine has raised."""
        return cls(f"{type(error).__name__}: {error}")


@contextmanager
def engine_faults() -> Iterator[None]:
    """Turn whatever the engine raises in this block into an `EngineFault`.

    A job that stops while its endpoint is gone is no fault.
    """
    try:
        yield
    except GivenUp:
        raise
    except Exception as error:
        raise EngineFault.of(error) from error
