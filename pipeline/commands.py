"""What the subcommands do, and the one place where an error becomes a sentence and an exit status."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from pipeline.driver import Rotten, Stopped
from pipeline.job import prepare, run_job
from pipeline.lease import OutputInUse
from pipeline.progress import Console
from pipeline.settings import CaptionSettings

P = ParamSpec("P")


def speaks(command: Callable[P, int]) -> Callable[P, int]:
    """Turn errors that a person can act on into one sentence and status 1."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return command(*args, **kwargs)
        except Rotten as error:
            return _refuse(error, 2)
        except (ValueError, OSError, OutputInUse, Stopped) as error:
            return _refuse(error, 1)

    return wrapped


def _refuse(error: Exception, status: int) -> int:
    print(f"blip2: {error}", file=sys.stderr)  # noqa: T201
    return status


@speaks
def caption(settings: CaptionSettings) -> int:
    """Caption an input, or go on with it."""
    console = Console()
    job = prepare(settings)
    result = run_job(job, console)
    for line in result.lines():
        console.say(line)
    return result.exit_status(settings.max_failed_fraction)
