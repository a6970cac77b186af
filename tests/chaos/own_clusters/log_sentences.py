"""The sentences of a job's log, for tests that compare them with recorded ones."""

from __future__ import annotations

import re
from pathlib import Path


def assert_said(log: Path, *recorded: str) -> None:
    """Assert that a log has these lines in this order, with others between them.

    Args:
        recorded: whole lines; "…" stands for a name, a number or a time of any kind.
    """
    lines = log.read_text().splitlines()
    rest = iter(lines)
    for sentence in recorded:
        pattern = ".+?".join(re.escape(part) for part in sentence.split("…"))
        found = any(re.fullmatch(pattern, line) for line in rest)
        assert found, "\n".join(["not said, or not here:", sentence, "in:", *lines])
