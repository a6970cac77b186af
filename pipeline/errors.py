"""Errors that end a run before its work is done; each message says what to do."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

SHARD: ContextVar[str | None] = ContextVar("shard", default=None)
"""The shard that this thread works on; messages of its log say so."""
WHILE = "while "
"""Begins the note that `noted` adds to an exception."""
GIVE_TOKEN = (
    "set RAY_AUTH_MODE=token, and give the token of the cluster in RAY_AUTH_TOKEN or in ~/.ray/auth_token"
)
"""What to do if a cluster refuses the token that it was given."""


@contextmanager
def noted(doing: str, shard: str | None = None) -> Iterator[None]:
    """Add a note to an exception of the block: what was being done, and on which node. The driver prints it.

    Args:
        doing: a stage and a file, such as "reading part0.tar".
        shard: the shard, for the log.
    """
    before = SHARD.get()
    SHARD.set(shard)
    try:
        yield
    except Exception as error:
        if not any(note.startswith(WHILE) for note in getattr(error, "__notes__", ())):
            error.add_note(f"{WHILE}{doing} on node {os.uname().nodename}")
        raise
    finally:
        SHARD.set(before)  # not `reset`: a generator may be closed in another thread


class InputError(ValueError):
    """The input cannot be used as the user named it; the message says what to do about it."""


class Stopped(RuntimeError):
    """The run was stopped; finished work is kept."""


def name_of(number: signal.Signals) -> str:
    """Return what has asked a job to stop: a signal, or the alarm that `--deadline` sets."""
    return "--deadline" if number == signal.SIGALRM else number.name


class StoppedBySignal(Stopped):
    """A signal has asked the run to stop, and it has stopped in good order."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(
            f"stopped by {name_of(number)}; finished work is kept; run the same command to resume"
        )
        self.number = number


class Interrupted(KeyboardInterrupt):
    """A signal ends the command at once, wherever it is; no handler of `Exception` may hold it up."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"stopped at once by {name_of(number)}; finished work is kept")
        self.number = number


class TooManyFailures(Stopped):
    """Most rows fail, so the run has stopped early."""


class RayStartFailed(RuntimeError):
    """Ray could not be started, or its cluster could not be reached; none of its processes is left."""


class RefusedByCluster(ValueError):
    """The cluster, or the Ray of this machine, cannot run the job as it is asked for; nothing was written."""


class OutputInUse(RuntimeError):
    """Another driver works on this output."""
