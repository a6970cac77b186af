"""The record of a run: its fingerprint, its settings and its shards, written once when it begins.

The shard list is written first and `run.json` last: a run has begun when `run.json` exists. Passwords and
options of input URIs are not stored.

`run.json` says in which format it was written. A file without `format_version` is of version 0, which has the
same fields. A file of a newer version is refused, because this version cannot know what its fields mean. The
version is no part of the fingerprint.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.inputs.shards import Shard, with_secrets, without_secrets
from pipeline.ledger.layout import RUN_FILE, SHARD_LIST
from pipeline.settings.fingerprint import GENERATION_CONFIG, Fingerprint
from pipeline.storage.folder import Folder

FORMAT_VERSION = 1
"""Raised when a reader of the version before would misread the file."""


@dataclass(frozen=True)
class Run:
    """What a run does, and on which shards."""

    fingerprint: Fingerprint
    settings: Mapping[str, Any]
    """The command's settings as plain values, so that `retry` and `status` need only the output folder."""
    shards: tuple[Shard, ...]

    @property
    def uses_generation_config(self) -> bool:
        """Whether the checkpoint's `generation_config.json` has set options of the run.

        It has not in runs of the versions that did not read it, and they must go on without it.
        """
        return GENERATION_CONFIG in self.fingerprint.parts


def write_run(folder: Folder, run: Run) -> None:
    """Begin a run in a folder."""
    stored = (replace(shard, root=without_secrets(shard.root)) for shard in run.shards)
    lines = "".join(json.dumps(asdict(shard)) + "\n" for shard in stored)
    folder.put(SHARD_LIST, gzip.compress(lines.encode(), mtime=0))
    record = {
        "format_version": FORMAT_VERSION,
        "fingerprint": run.fingerprint.parts,
        "settings": run.settings,
    }
    folder.put(RUN_FILE, json.dumps(record, indent=1).encode())


def read_run(folder: Folder, inputs: Sequence[str] = ()) -> Run | None:
    """Return the run that was begun in a folder, or None.

    Args:
        inputs: the input URIs of the command, with the passwords and options that the record leaves out.

    Raises:
        ValueError: a newer version of this program has written the record.
    """
    record, shards = folder.get(RUN_FILE), folder.get(SHARD_LIST)
    if record is None or shards is None:
        return None
    values = json.loads(record)
    version = values.get("format_version", 0)
    if version > FORMAT_VERSION:
        raise ValueError(
            f"a newer version of this program has begun the run in {folder}: {RUN_FILE} has format version "
            f"{version}, and this version reads up to {FORMAT_VERSION}; use the newer version, or give "
            "another --output"
        )
    return Run(
        fingerprint=Fingerprint(values["fingerprint"]),
        settings=values["settings"],
        shards=tuple(
            with_secrets(Shard(**json.loads(line)), inputs) for line in gzip.decompress(shards).splitlines()
        ),
    )
