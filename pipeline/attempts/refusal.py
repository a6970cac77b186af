"""`Refusal`: why a submitted job was last refused, kept in its output, as the cluster of the job may be gone.

It claims nothing: any run may begin in the output, and no later start is refused because of it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from pipeline.ledger.layout import REFUSAL
from pipeline.storage.folder import Folder


@dataclass(frozen=True)
class Refusal:
    """A start that was refused before any work."""

    time: str
    """When the job was refused: UTC, in ISO 8601."""
    command: str
    """The command line, without secrets."""
    version: str
    """Version of this program."""
    reason: str

    def __str__(self) -> str:
        return f"a job was refused at {self.time[:19].replace('T', ' ')} UTC: {self.reason}"


def keep_refusal(folder: Folder, refusal: Refusal) -> None:
    """Write or replace the note in an output."""
    folder.put(REFUSAL, json.dumps(asdict(refusal), indent=1).encode())


def last_refusal(folder: Folder) -> Refusal | None:
    """Return why a job was last refused in an output; None if none was, or the note is damaged."""
    content = folder.get(REFUSAL)
    try:
        return None if content is None else Refusal(**json.loads(content))
    except (ValueError, TypeError):
        return None
