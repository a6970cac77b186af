"""What the subcommands do, and the one place where an error becomes a sentence and an exit status."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from blip2_actor import EngineBuilder
from pipeline.errors import OutputInUse, RayStartFailed, Stopped, TooManyFailures
from pipeline.progress import Console
from pipeline.report.status import status_lines
from pipeline.run.job import Job
from pipeline.run.prepare import prepare, prepare_retry
from pipeline.run.run_job import run_job
from pipeline.settings.job_settings import CaptionSettings, EmbedSettings, ScoreSettings
from pipeline.settings.report_settings import StatusSettings
from pipeline.settings.retry_settings import RetrySettings
from pipeline.stages.engine_fault import EngineFault

P = ParamSpec("P")


def errors_to_exit_status(command: Callable[P, int]) -> Callable[P, int]:
    """Turn errors that a person can act on into one sentence and status 1."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return command(*args, **kwargs)
        except TooManyFailures as error:
            return _refuse(error, 2)
        except EngineFault as error:
            return _refuse(f"the engine has failed: {error}", 1)
        except (ValueError, OSError, OutputInUse, RayStartFailed, Stopped) as error:
            return _refuse(error, 1)

    return wrapped


def _refuse(error: object, status: int) -> int:
    print(f"blip2: {error}", file=sys.stderr)  # noqa: T201
    return status


@errors_to_exit_status
def caption(settings: CaptionSettings, engine: EngineBuilder | None = None) -> int:
    """Caption an input, or go on with it."""
    return _finish(prepare(settings, engine), settings.max_failed_fraction)


@errors_to_exit_status
def embed(settings: EmbedSettings, engine: EngineBuilder | None = None) -> int:
    """Embed an input, or go on with it."""
    return _finish(prepare(settings.job(), engine), settings.max_failed_fraction)


@errors_to_exit_status
def score(settings: ScoreSettings, engine: EngineBuilder | None = None) -> int:
    """Score the texts of an input, or go on with it."""
    return _finish(prepare(settings.job(), engine), settings.max_failed_fraction)


@errors_to_exit_status
def retry(settings: RetrySettings, engine: EngineBuilder | None = None) -> int:
    """Try the rows again that are not ok."""
    return _finish(prepare_retry(settings, engine), settings.max_failed_fraction)


@errors_to_exit_status
def status(settings: StatusSettings) -> int:
    """Say how far a run is."""
    console = Console()
    for line in status_lines(settings.output):
        console.say(line)
    return 0


def _finish(job: Job, max_failed_fraction: float) -> int:
    console = Console()
    result = run_job(job, console)
    for line in result.lines():
        console.say(line)
    return result.exit_status(max_failed_fraction)
