"""`blip2 status`, apart from the commands that run a job: it imports no Ray."""

from __future__ import annotations

from pipeline.exit_status import ExitStatus, before_work, errors_to_exit_status
from pipeline.progress import Console
from pipeline.report.status import RunStatus
from pipeline.settings.report_settings import StatusSettings


@errors_to_exit_status
def status(settings: StatusSettings) -> int:
    """Print how far a run is."""
    console = Console()
    with before_work(type(settings)):
        found = RunStatus.read(settings.output)
        document, lines = (found.to_dict(), []) if console.is_json else ({}, found.lines())
    if document:
        console.event("status", **document)
    for line in lines:
        console.result(line)
    return ExitStatus.DONE
