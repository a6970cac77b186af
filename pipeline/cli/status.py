"""`blip2 status`, apart from the commands that run a job: it imports no Ray."""

from __future__ import annotations

import time

from pipeline.exit_status import ExitStatus, before_work, errors_to_exit_status
from pipeline.progress import Console, is_read
from pipeline.report.status import RunStatus
from pipeline.settings.report_settings import StatusSettings

WATCH_EVERY_S = 5.0


@errors_to_exit_status
def status(settings: StatusSettings) -> int:
    """Print the progress of a run; with `watch`, again and again while a driver works and output is read."""
    console = Console()
    with before_work(type(settings)):
        found = RunStatus.read(settings.output)
        lines = _lines(found, console)
    while True:
        for line in lines:
            console.result(line)
        if not (settings.watch and found.has_driver and is_read()):
            return ExitStatus.DONE
        time.sleep(WATCH_EVERY_S)
        found = RunStatus.read(settings.output)
        lines = _lines(found, console)
        console.clear()


def _lines(found: RunStatus, console: Console) -> list[str]:
    """Return the lines for people; to programs, print the event instead."""
    if not console.is_json:
        return found.lines()
    console.event("status", **found.to_dict())
    return []
