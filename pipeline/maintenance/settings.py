"""The settings of `blip2 verify` and `blip2 clean`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """Read every file of an output back and check rows, order, settings and input. Needs no Ray."""

    output: str
    """Folder or URI of a run, finished or in progress."""
    input: tuple[str, ...] = ()
    """The input again, if its URIs hold passwords or options: these are not stored in the output."""
    json: bool = False
    """Print the counts and all findings as one JSON document."""


@dataclass(frozen=True, kw_only=True)
class CleanSettings:
    """Show which files of an output are of no use any more, and delete them with --yes. Needs no Ray."""

    output: str
    """Folder or URI of a run that no driver works on."""
    yes: bool = False
    """Delete the files; without it they are only listed."""
