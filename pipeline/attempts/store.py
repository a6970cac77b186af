"""The records of attempts in an output: one JSON file each, in a bounded number."""

from __future__ import annotations

import json

from pipeline.attempts.attempt import Attempt, Attempts, fold
from pipeline.ledger.layout import ATTEMPTS, LOGS
from pipeline.storage.filesystems import at_once
from pipeline.storage.folder import Folder

MAX_RECORDS = 64
"""Maximum number of records; the oldest of more attempts are folded into one."""


def write_attempt(folder: Folder, attempt: Attempt) -> None:
    """Write or replace the record of an attempt."""
    folder.put(_name_of(attempt), json.dumps(attempt.to_dict(), indent=1).encode())


def read_attempts(folder: Folder) -> Attempts:
    """Read all records of an output, oldest first. A record that cannot be read as one is left out."""
    names = sorted(folder.names(ATTEMPTS))
    found = [attempt for attempt in map(_parse, at_once(folder.get, names)) if attempt is not None]
    folded = {attempt.folded for attempt in found}
    return Attempts(tuple(attempt for attempt in found if attempt.id not in folded))


def make_room(folder: Folder, max_records: int = MAX_RECORDS) -> None:
    """Fold the oldest records into one, until one more may be written."""
    attempts = list(read_attempts(folder))
    while len(attempts) >= max_records:
        first, second = attempts[:2]
        attempts[:2] = [fold(first, second)]
        # If this process dies in between, readers leave the second one out: the first says that it has it.
        write_attempt(folder, attempts[0])
        folder.delete(_name_of(second))
        folder.delete(log_name(second))


def log_name(attempt: Attempt) -> str:
    """Return the name of an attempt's log."""
    return f"{LOGS}/{attempt.begun_at:%Y%m%dT%H%M%S.%f}-{attempt.id}.jsonl"


def _name_of(attempt: Attempt) -> str:
    """Return a name by which the files are sorted by their begin."""
    return f"{ATTEMPTS}/{attempt.begun_at:%Y%m%dT%H%M%S.%f}-{attempt.id}.json"


def _parse(content: bytes | None) -> Attempt | None:
    try:
        return None if content is None else Attempt.from_dict(json.loads(content))
    except (ValueError, TypeError, AttributeError):
        return None
