"""The settings of `blip2 export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Target = Literal["csv", "jsonl", "txt", "imagefolder", "webdataset"]


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Write the rows of a run in another format, next to their images if wanted. Needs no Ray."""

    output: str
    """Folder or URI of a run, finished or in progress."""
    to: Target
    """csv and jsonl hold every row, txt a caption per line, imagefolder and webdataset also the images."""
    into: str
    """Folder on this machine to write into; the same command goes on with an export that was stopped."""
    input: tuple[str, ...] = ()
    """The input again, if its URIs hold passwords or options: these are not stored in the output."""

    def __post_init__(self) -> None:
        if "://" in self.into:
            raise ValueError(
                f"into must be a folder on this machine, got {self.into}; export there, and copy the files"
            )
