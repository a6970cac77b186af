"""Exit statuses: the one table, and the one place where an error becomes a sentence and a status.

The rule: what is refused before anything has started exits with `REFUSED`, because the same command cannot
succeed. What fails after work has begun exits with `FAILED`, because the same command resumes. Commands mark
the first part with `before_work`; `errors_to_exit_status` does the rest.

Every other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import ParamSpec

from blip2_actor.flags import WRONG_FLAGS, with_flags
from pipeline.errors import (
    Interrupted,
    OutputInUse,
    RayStartFailed,
    RefusedByCluster,
    Stopped,
    StoppedBySignal,
    TooManyFailures,
)
from pipeline.progress import Console
from pipeline.run.signals import StopRequest
from pipeline.stages.engine_fault import EngineFault
from pipeline.storage.secrets import hide_secrets

P = ParamSpec("P")
REMEDIES = {
    errno.ENOSPC: "free space on the disk that is written to, and run the same command again",
    errno.EDQUOT: "free space within the quota, and run the same command again",
    errno.EACCES: "give the missing permission, or name another place",
    errno.EROFS: "make the disk writable, or name a place on another one",
}
"""What to do about errors of a disk, whose messages may not even name a file."""
logger = logging.getLogger(__name__)


class ExitStatus(IntEnum):
    """What the exit status of every command says."""

    DONE = 0
    """Finished; the share of failed rows is at most --max-failed-fraction."""
    FAILED = 1
    """Failed; the same command may succeed, and finished work is kept."""
    TOO_MANY_FAILURES = 2
    """Finished or stopped early, and too many rows failed; a partial shard counts as one more failed row.
    Or finished, and more captions are flagged than --max-flagged-fraction allows."""
    REFUSED = WRONG_FLAGS
    """Refused before work: flags, input, model or output must change first. Nothing was started."""
    HUNG_UP = 129
    """Stopped by SIGHUP, because the terminal was closed; finished work is kept."""
    INTERRUPTED = 130
    """Stopped by SIGINT; finished work is kept."""
    TERMINATED = 143
    """Stopped by SIGTERM or --deadline; finished work is kept."""


class Refused(Exception):
    """A command cannot start; the message says what to change."""


@contextmanager
def before_work(settings: type) -> Iterator[None]:
    """Turn the errors of checks, made before anything is started, into `Refused`, which names flags.

    Args:
        settings: the dataclass of the command.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise Refused(with_flags(_sentence(error), settings)) from error


def errors_to_exit_status(command: Callable[P, int]) -> Callable[P, int]:
    """Print errors that a person can act on as one sentence, and return their exit status."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            with StopRequest().by_signals():
                return command(*args, **kwargs)
        except (Exception, Interrupted) as error:
            status = status_of(error)
            if status is None:
                raise
            logger.debug("the error was raised here", exc_info=True)  # --verbose prints it
            reason = _sentence(error)
            if args and dataclasses.is_dataclass(args[0]):
                reason = with_flags(reason, type(args[0]))
            sentence = hide_secrets(reason)
            Console().event("error", text=sentence, exit_status=status)
            Console(sys.stderr).error(f"blip2: {sentence}")
            return status

    return wrapped


def _sentence(error: BaseException) -> str:
    """Return the message of an error; for one of a disk, add what to do."""
    remedy = REMEDIES.get(error.errno or 0) if isinstance(error, OSError) else None
    said = f"the engine has failed: {error}" if isinstance(error, EngineFault) else str(error)
    return said if remedy is None else f"{said}; {remedy}"


def status_of(error: BaseException) -> ExitStatus | None:
    """Return the exit status of a command that an error ends, or None if the error is a bug."""
    if isinstance(error, (Interrupted, StoppedBySignal)):
        # By convention of shells; a deadline is like SIGTERM.
        is_deadline = error.number == signal.SIGALRM
        return ExitStatus.TERMINATED if is_deadline else ExitStatus(128 + error.number)
    if isinstance(error, (Refused, RefusedByCluster)):
        return ExitStatus.REFUSED
    if isinstance(error, TooManyFailures):
        return ExitStatus.TOO_MANY_FAILURES
    if isinstance(error, (ValueError, OSError, EngineFault, OutputInUse, RayStartFailed, Stopped)):
        return ExitStatus.FAILED
    return None
