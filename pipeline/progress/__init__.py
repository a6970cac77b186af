"""What a command says: results, notes and warnings, and how far it is.

`Console` is the only place that writes them: as text with a live area in a terminal, as plain lines
elsewhere, as JSON lines for programs.
"""

from __future__ import annotations

from pipeline.progress.console import LINE_EVERY_S, LOG_EVERY_S, Console, choose_style
from pipeline.progress.rate import Rate
from pipeline.progress.snapshot import ProgressSnapshot
from pipeline.progress.wording import count, cut, duration, format_bytes
from pipeline.progress.writing import is_read, lost_output, write, write_json, write_toml

__all__ = [
    "LINE_EVERY_S",
    "LOG_EVERY_S",
    "Console",
    "ProgressSnapshot",
    "Rate",
    "choose_style",
    "count",
    "cut",
    "duration",
    "format_bytes",
    "is_read",
    "lost_output",
    "write",
    "write_json",
    "write_toml",
]
