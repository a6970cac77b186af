"""Compare the input of a run with what its output was made from: files by their stamps, and their bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.finding import Finding
from pipeline.inputs.changes import InputChanges, name_some
from pipeline.inputs.shards import Shard, without_secrets
from pipeline.inputs.stamps import sample_digest
from pipeline.ledger.commit import Summary
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.run_record import Run
from pipeline.progress import count
from pipeline.storage.filesystems import at_once

REDO = "restore the input, or add --redo-changed to the command to make all rows of the shard again"


def check_input(
    ledger: Ledger, run: Run, inputs: Sequence[str], summaries: Mapping[str, Summary]
) -> Iterator[Finding]:
    """Yield how the input differs from what the run has read.

    Args:
        inputs: the inputs with their passwords and options; default: as they are stored.
        summaries: what the footers of the finished shards say, by shard.
    """
    if not inputs and run.hides_options and any("://" in name for name in run.inputs):
        yield Finding(
            "input",
            "warn",
            "is not compared: its passwords and options are not stored in the output",
            "give --input again as in the first command",
        )
        return
    try:
        changes = ledger.compare_input(run, inputs)
    except (InputError, OSError) as error:
        yield Finding(
            "input", "warn", f"cannot be compared: {error}", "verify again where the input can be read"
        )
        return
    for name, how in changes.changed.items():
        yield Finding(name, "fail", f"its input has changed since the run began: {how}", REDO)
    unchanged = [shard for shard in run.shards if shard.name not in changes.changed]
    yield from _compare_bytes(unchanged, set(changes.gone), summaries)
    yield from _new_and_gone(changes)


def _compare_bytes(
    shards: Sequence[Shard], gone: set[tuple[str, str]], summaries: Mapping[str, Summary]
) -> Iterator[Finding]:
    """Compare a sample of the bytes of each file with what the run has read from it.

    The images of folders are not read: the run keeps the digest of each one in its row.
    """
    known: dict[tuple[str, str], tuple[Shard, str]] = {}
    for shard in shards:
        content = summaries[shard.name].content if shard.name in summaries else None
        if content is not None and (without_secrets(shard.root), shard.files[0]) not in gone:
            known.setdefault((shard.root, shard.files[0]), (shard, content))  # Ranges share their file.
    yield from filter(None, at_once(lambda pair: _difference(*pair), known.values()))


def _difference(shard: Shard, content: str) -> Finding | None:
    try:
        if sample_digest(shard) == content:
            return None
    except (InputError, OSError, pa.ArrowException) as error:
        return Finding(
            shard.name, "warn", f"its input cannot be read: {error}", "verify again where it can be read"
        )
    return Finding(
        shard.name,
        "fail",
        f"its input {shard.uri} has other bytes than the run has read, and the same size and time",
        "restore the input; or delete the shard's file and run the same command again",
    )


def _new_and_gone(changes: InputChanges) -> Iterator[Finding]:
    if changes.gone:
        yield Finding(
            "input",
            "warn",
            f"{count(len(changes.gone), 'file')} of the run can no longer be found: "
            f"{name_some(changes.names_of_gone)}",
            "restore the input before a retry; finished rows stay",
        )
    if changes.num_new:
        names = sorted(file for files in changes.new.chosen.values() for file in files)
        yield Finding(
            "input",
            "warn",
            f"{count(len(names), 'new file')}: {name_some(names)}",
            "run the first command with --add-new to take them into the run",
        )
