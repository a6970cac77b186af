"""The settings of the commands that only read an output: `blip2 report` and `blip2 status`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Report on the rows of a run: failures and their reasons, lengths, repeated captions. Needs no Ray."""

    output: str
    """Folder or URI of a run."""
    html: str | None = None
    """Also write a self-contained HTML page with the report and sample rows to this file."""
    thumbnails: int = 24
    """Maximum number of sample rows with a picture on the page; pictures are read again from the input."""

    def __post_init__(self) -> None:
        if self.thumbnails < 0:
            raise ValueError(f"thumbnails must be at least 0, got {self.thumbnails}")


@dataclass(frozen=True, kw_only=True)
class StatusSettings:
    """Show how far a run is: finished rows, failures by status, rows left, and the ETA. Needs no Ray."""

    output: str
    """Folder or URI of a run, finished or in progress."""
