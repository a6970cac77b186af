"""Compare the sentences of a job's log with recorded ones."""

from __future__ import annotations

import re
from pathlib import Path


def assert_said(log: Path, *recorded: str) -> None:
    """Assert that a log has these lines in this order; other lines may come between them.

    Args:
        recorded: whole lines; "…" matches any name, number or time.
    """
    lines = log.read_text().splitlines()
    rest = iter(lines)
    for sentence in recorded:
        pattern = ".+?".join(re.escape(part) for part in sentence.split("…"))
        found = any(re.fullmatch(pattern, line) for line in rest)
        assert found, "\n".join(["not said, or not here:", sentence, "in:", *lines])
