"""The settings of commands that only read outputs: `blip2 report`, `compare`, `calibrate`, `status`, `show`,
`export`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from blip2_actor import Status
from blip2_actor.flags import positional, written_as
from blip2_actor.inputs.field_types import require_types

Target = Literal["csv", "jsonl", "txt", "imagefolder", "webdataset"]
NOT_OK = "not_ok"
"""Stands for every status but ok."""


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Report on the rows of a run: failures and their reasons, lengths, repeated captions. Needs no Ray."""

    output: str = field(metadata=positional())
    """Folder or URI of a run."""
    html: str | None = None
    """Also write a self-contained HTML page with the report and a contact sheet to this file."""
    thumbnails: int = 400
    """Maximum number of rows with a picture on the page; pictures are read again from the input."""
    json: bool = False
    """Print the report as one JSON object."""
    card: str | None = None
    """Also write a dataset card for the Hugging Face hub to this file, such as README.md."""

    def __post_init__(self) -> None:
        require_types(self)
        if self.thumbnails < 0:
            raise ValueError(f"thumbnails must be at least 0, got {self.thumbnails}")
        if self.card is not None and self.card == self.html:
            raise ValueError(f"card must be another file than --html, got {self.card} twice; name two files")


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Compare the captions of two runs over the same images. Needs no Ray."""

    before: str = field(metadata=written_as("A") | positional())
    """Folder or URI of the first run, or of Parquet files with the columns of one, as an endpoint records
    them (--trial-record)."""
    after: str = field(metadata=written_as("B") | positional())
    """Folder or URI of the second run."""
    reference: str | None = None
    """Kept column of either run with the right caption, or a list of them; adds exact match, BLEU-4 and
    CIDEr."""
    html: str | None = None
    """Also write a self-contained HTML page with the largest changes to this file."""
    thumbnails: int = 200
    """Maximum number of rows with a picture on the page; pictures are read again from the input."""
    json: bool = False
    """Print the comparison as one JSON object."""

    def __post_init__(self) -> None:
        require_types(self)
        if self.before.rstrip("/") == self.after.rstrip("/"):
            raise ValueError(f"after must be another output than the first, got {self.after} twice")
        if self.thumbnails < 0:
            raise ValueError(f"thumbnails must be at least 0, got {self.thumbnails}")


@dataclass(frozen=True, kw_only=True)
class CalibrateSettings:
    """Fit the probability that a caption is right, on a run whose right captions are known. Needs no Ray."""

    output: str = field(metadata=positional())
    """Folder or URI of a run."""
    reference: str | None = None
    """Kept column with the right caption or a list of them, or with true and false for right and wrong."""
    judged: str | None = None
    """CSV file with the columns key and right (true or false), instead of --reference."""
    into: str = "calibration.json"
    """File to write, for --calibration of blip2 caption and blip2 serve."""
    json: bool = False
    """Print the calibration as one JSON object."""

    def __post_init__(self) -> None:
        require_types(self)
        if (self.reference is None) == (self.judged is None):
            got = "neither" if self.reference is None else "both"
            raise ValueError(f"reference must be given, or --judged in its place, got {got}")


@dataclass(frozen=True, kw_only=True)
class StatusSettings:
    """Show how far a run is: finished rows, failures by status, rows left, and the ETA. Needs no Ray."""

    output: str = field(metadata=positional())
    """Folder or URI of a run, finished or in progress."""
    watch: bool = False
    """Show it again every 5 s, as long as a driver works on the run."""

    def __post_init__(self) -> None:
        require_types(self)


@dataclass(frozen=True, kw_only=True)
class ShowSettings:
    """Show rows of a run in the terminal: keys, captions, and why rows failed. Needs no Ray."""

    output: str = field(metadata=positional())
    """Folder or URI of a run, finished or in progress."""
    status: tuple[str, ...] = ()
    """Show only rows with one of these statuses; not_ok means every status but ok."""
    grep: str | None = None
    """Show only rows with a text that matches this regular expression: key, caption, error, named columns."""
    sort: str | None = None
    """Show the rows with the lowest values of this column first, such as logprob."""
    descending: bool = False
    """With --sort: the highest values first."""
    limit: int = 20
    """Maximum number of rows; 0 shows all."""
    json: bool = False
    """Print every column, one JSON object per line."""

    def __post_init__(self) -> None:
        require_types(self)
        known = [*(status.value for status in Status), NOT_OK]
        for status in self.status:
            if status not in known:
                raise ValueError(f"status must be one of {', '.join(known)}, got {status}")
        if self.limit < 0:
            raise ValueError(f"limit must be at least 0, got {self.limit}")
        if self.sort is not None and not self.limit:
            raise ValueError("limit must be at least 1 with sort, got 0; so many rows are kept in memory")
        if self.descending and self.sort is None:
            raise ValueError("descending must be given with sort; name a column: --sort logprob --descending")


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Write the rows of a run in another format, next to their images if wanted. Needs no Ray."""

    output: str = field(metadata=positional())
    """Folder or URI of a run, finished or in progress."""
    to: Target
    """csv and jsonl hold every row, txt a caption per line, imagefolder and webdataset also the images."""
    into: str
    """Folder on this machine to write into; the same command goes on with an export that was stopped."""
    input: tuple[str, ...] = ()
    """The input again, if its URIs hold passwords or options: these are not stored in the output."""

    def __post_init__(self) -> None:
        require_types(self)
        if not self.into or "://" in self.into:
            raise ValueError(
                f"into must be a folder on this machine, got {self.into!r}; export there, and copy the files"
            )
