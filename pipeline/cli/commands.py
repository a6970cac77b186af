"""The subcommands that run a job: check, run, report, exit status."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from blip2_actor import EngineBuilder, __version__
from blip2_actor.flags import with_flags
from pipeline.attempts.environment import command_line
from pipeline.attempts.refusal import Refusal, keep_refusal
from pipeline.errors import RefusedByCluster
from pipeline.exit_status import Refused, before_work, errors_to_exit_status
from pipeline.placement.storage_check import SUBMITTED
from pipeline.progress import Console
from pipeline.run.job import Job
from pipeline.run.prepare import prepare, prepare_retry
from pipeline.run.run_job import run_job
from pipeline.settings.job_settings import CaptionSettings, EmbedSettings, ScoreSettings
from pipeline.settings.retry_settings import RetrySettings
from pipeline.show.outcome import tell_outcome
from pipeline.storage.folder import Folder
from pipeline.storage.secrets import hide_secrets


@errors_to_exit_status
def caption(
    settings: CaptionSettings | EmbedSettings | ScoreSettings, engine: EngineBuilder | None = None
) -> int:
    """Caption an input, or embed or score it; or resume."""
    return _start(settings, lambda: prepare(settings.job(), engine))


@errors_to_exit_status
def retry(settings: RetrySettings, engine: EngineBuilder | None = None) -> int:
    """Run the rows again that are not ok."""
    return _start(settings, lambda: prepare_retry(settings, engine))


def _start(settings: Any, prepared: Callable[[], Job]) -> int:
    with _refusal_kept(settings.output, type(settings)):
        with before_work(type(settings)):
            job = prepared()
        console = Console()
        return tell_outcome(console, job, run_job(job, console))


@contextmanager
def _refusal_kept(output: str, settings: type) -> Iterator[None]:
    """Keep in the output why a submitted job is refused: its log may go with its cluster.

    Args:
        output: may not exist, or not be writable; then nothing is kept.
        settings: the dataclass of the command.
    """
    try:
        yield
    except (Refused, RefusedByCluster) as error:
        is_shared = "://" in output or os.path.isabs(output)
        if SUBMITTED in os.environ and is_shared:
            reason = hide_secrets(with_flags(str(error), settings))
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            with suppress(OSError, ValueError):
                keep_refusal(Folder(output), Refusal(now, command_line(), __version__, reason))
        raise
