"""The subcommands that run a job: check, run, report, exit status."""

from __future__ import annotations

from blip2_actor import EngineBuilder
from pipeline.exit_status import before_work, errors_to_exit_status
from pipeline.progress import Console
from pipeline.run.job import Job
from pipeline.run.prepare import prepare, prepare_retry
from pipeline.run.run_job import run_job
from pipeline.settings.job_settings import CaptionSettings, EmbedSettings, ScoreSettings
from pipeline.settings.retry_settings import RetrySettings
from pipeline.show.outcome import tell_outcome


@errors_to_exit_status
def caption(settings: CaptionSettings, engine: EngineBuilder | None = None) -> int:
    """Caption an input, or resume."""
    with before_work(type(settings)):
        job = prepare(settings, engine)
    return _run(job)


@errors_to_exit_status
def embed(settings: EmbedSettings, engine: EngineBuilder | None = None) -> int:
    """Embed an input, or resume."""
    with before_work(type(settings)):
        job = prepare(settings.job(), engine)
    return _run(job)


@errors_to_exit_status
def score(settings: ScoreSettings, engine: EngineBuilder | None = None) -> int:
    """Score the texts of an input, or resume."""
    with before_work(type(settings)):
        job = prepare(settings.job(), engine)
    return _run(job)


@errors_to_exit_status
def retry(settings: RetrySettings, engine: EngineBuilder | None = None) -> int:
    """Run the rows again that are not ok."""
    with before_work(type(settings)):
        job = prepare_retry(settings, engine)
    return _run(job)


def _run(job: Job) -> int:
    console = Console()
    result = run_job(job, console)
    return tell_outcome(console, job, result)
