"""Why a job ends before its work is done.

When Ray gives up, the message gives only the cause, without tracebacks and without Ray's advice.
"""

from __future__ import annotations

import re

from pipeline.endpoint.waiting import KEY_PATIENCE_S, KeyRefused
from pipeline.errors import WHILE, Stopped
from pipeline.progress import duration
from pipeline.stages.coordinator import News
from pipeline.stages.device_health import DeviceLeftOut
from pipeline.storage.secrets import hide_secrets

MAX_CHARS = 400
_RAYS_ADVICE = re.compile(r"\n\s*(?:Failed to .* after \d+/\d+ attempts|To change retry attempts)")
"""Ray Data appends these lines to the message of every exception of a worker."""
_EXCEPTION = re.compile(r"^\s*([A-Za-z_][\w.]*(?:Error|Exception|Fault|Failed|Mismatch|Exit))(?:: (.+))?$")
"""The line of a traceback that names the exception."""
_OF_RAY = ("UserCodeException", "RayTaskError")
"""Ray wraps the cause in these, and its text follows that of the cause."""
_OURS = ("ValueError", "OSError", "InputError", "EngineFault")
"""The messages of these are sentences of their own."""


def end_named_by(news: News) -> Stopped | None:
    """Return the error that must end a job after news of its workers; None if it can go on."""
    for failure in news.failures:
        if failure.is_last:
            return DeviceLeftOut(failure.device)
    for trouble in news.troubles:
        if isinstance(trouble, KeyRefused):
            waited = f"{trouble.state} for {duration(KEY_PATIENCE_S)}"
            return Stopped(
                f"the endpoint has been {waited}; finished work is kept; allow the key again, or give "
                "another with --endpoint-key-file, and run the same command to resume"
            )
    return None


def describe_failure(error: BaseException) -> str:
    """Return what a worker's exception said, and where it was raised, as one phrase without secrets."""
    text = _RAYS_ADVICE.split(str(error))[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [match for match in map(_EXCEPTION.match, lines) if match]
    found = [match for match in named if match.group(1).rpartition(".")[2] not in _OF_RAY] or named
    said = [line for line in lines if not line.startswith(WHILE)]
    phrase = said[-1] if said else type(error).__name__
    if found:
        kind, message = found[-1].group(1).rpartition(".")[2], found[-1].group(2)
        phrase = message if message and kind in _OURS else f"{kind}: {message}" if message else kind
    where = [line for line in lines if line.startswith(WHILE) and " on node " in line]
    phrase = phrase[:MAX_CHARS].rstrip(".")
    return hide_secrets(f"{phrase}, {where[-1][:MAX_CHARS]}" if where else phrase)
