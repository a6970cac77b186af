"""`AttemptLog`: what a driver printed in one attempt, to be read after its terminal is gone."""

from __future__ import annotations

import json
from collections import deque
from datetime import UTC, datetime

from pipeline.storage.secrets import hide_secrets

MAX_FIRST = 500
MAX_LAST = 1_500
"""Lines that are kept from the start and from the end; between them, the log says how many are left out."""


class AttemptLog:
    """Lines of JSON: `time`, `event` (note, warning, failure, result, error), `run` and `text`."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._first: list[str] = []
        self._last: deque[str] = deque(maxlen=MAX_LAST)
        self._num_left_out = 0

    def add(self, event: str, text: str) -> None:
        """Add a line; secrets of URIs are hidden."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        values = {"time": time, "event": event, "run": self._run_id, "text": hide_secrets(text.strip())}
        line = json.dumps(values, ensure_ascii=False)
        if len(self._first) < MAX_FIRST:
            self._first.append(line)
            return
        self._num_left_out += len(self._last) == MAX_LAST
        self._last.append(line)

    def content(self) -> bytes:
        """Return the log as it is stored."""
        left_out = [json.dumps({"event": "left_out", "num_lines": self._num_left_out})]
        lines = [*self._first, *(left_out if self._num_left_out else []), *self._last]
        # The name of a file need not be UTF-8; what is escaped here, JSON reads back.
        return "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace")
