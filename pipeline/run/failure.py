"""What a person reads when Ray gives up: the cause alone, without tracebacks and without Ray's advice."""

from __future__ import annotations

import re

from pipeline.storage.secrets import hide_secrets

MAX_CHARS = 400
_RAYS_ADVICE = re.compile(r"\n\s*(?:Failed to .* after \d+/\d+ attempts|To change retry attempts)")
"""Ray Data appends these lines to the message of every exception of a worker."""
_EXCEPTION = re.compile(r"^\s*([A-Za-z_][\w.]*(?:Error|Exception|Fault|Failed|Mismatch|Exit))(?:: (.+))?$")
"""The line of a traceback that names the exception."""
_OURS = ("ValueError", "OSError", "InputError", "EngineFault")
"""The messages of these are sentences of their own."""


def describe_failure(error: BaseException) -> str:
    """Return what a worker's exception said, as one phrase without secrets."""
    text = _RAYS_ADVICE.split(str(error))[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = [match for match in map(_EXCEPTION.match, lines) if match]
    phrase = lines[-1] if lines else type(error).__name__
    if found:
        kind, message = found[-1].group(1).rpartition(".")[2], found[-1].group(2)
        phrase = message if message and kind in _OURS else f"{kind}: {message}" if message else kind
    return hide_secrets(phrase[:MAX_CHARS]).rstrip(".")
