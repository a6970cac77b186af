"""The command `blip2 clean`: list which files of an output are of no use, and delete them with --yes.

Results, the record of the run, and rows that a resume or a retry goes on with are never deleted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import pyarrow as pa

from pipeline.errors import OutputInUse
from pipeline.exit_status import ExitStatus, before_work, errors_to_exit_status
from pipeline.inputs.changes import name_some
from pipeline.ledger.commit import Summary, read_summary
from pipeline.ledger.layout import LEASE, PLAN_FOLDERS, STATE
from pipeline.ledger.lease import Lease, driver_at_work, read_holders
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.run_record import Run
from pipeline.maintenance.removable import Removable, find_removable
from pipeline.maintenance.settings import CleanSettings
from pipeline.progress import Console, count, format_bytes
from pipeline.storage.filesystems import at_once
from pipeline.storage.folder import ASIDE, Folder

MIN_PLAN_AGE_S = 3600.0
"""Minimum age of a plan's files; younger ones may belong to a running plan, which takes no lease."""


@errors_to_exit_status
def clean(settings: CleanSettings) -> int:
    """Print what is of no use, and delete it if that is asked for."""
    console = Console()
    with before_work(type(settings)):
        ledger = Ledger(Folder(settings.output))
        run = ledger.load()
        if run is not None:
            ledger = ledger.of(run)
        elif not ((state := ledger.scan()).leftovers or state.unread_lists(run)):
            ledger.require_run()
    holder = driver_at_work(ledger.folder)
    if holder is not None:
        raise OutputInUse(
            f"output must have no driver while it is cleaned, got {ledger} while {holder} works on it; "
            "wait for it, or stop it"
        )
    dead_leases = [*read_holders(ledger.folder)]
    if settings.yes:
        with Lease(ledger.folder):  # which also deletes the leases of dead drivers
            if run is not None:
                ledger.require_unrevised(run)  # fragments of new shards would look like those of no shard
            removable, sizes = _find(ledger, run, dead_leases)
            _delete(ledger, run, removable.names)
        ledger.folder.drop_if_empty(ASIDE)
    else:
        removable, sizes = _find(ledger, run, dead_leases)
    if console.is_json:
        files, num_bytes = removable.by_reason, sum(sizes.values())
        console.event("clean", files=files, num_bytes=num_bytes, is_deleted=settings.yes)
        return ExitStatus.DONE
    for line in _lines(removable, sizes, settings.yes):
        console.result(line)
    return ExitStatus.DONE


def _find(ledger: Ledger, run: Run | None, dead_leases: Sequence[str]) -> tuple[Removable, dict[str, int]]:
    """List the output, and find what is of no use and how many bytes each file has."""
    state = ledger.scan()
    files = {file.name: file for file in ledger.folder.files(STATE)}
    before = time.time() - MIN_PLAN_AGE_S
    young = {name for name, file in files.items() if name.startswith(PLAN_FOLDERS) and file.written > before}
    state = replace(state, leftovers=tuple(name for name in state.leftovers if name not in young))
    summaries = _summaries(ledger.folder, state.finished & state.fragments.keys())
    removable = find_removable(run, state, summaries, dead_leases)
    return removable, {name: files[name].num_bytes for name in removable.names if name in files}


def _summaries(folder: Folder, shards: Iterable[str]) -> dict[str, Summary]:
    """Read the footers of some finished shards; a file that cannot be read has none."""
    found = {}
    for shard in shards:
        try:
            found[shard] = read_summary(folder, shard)
        except (OSError, pa.ArrowException, ValueError, KeyError):
            continue
    return found


def _delete(ledger: Ledger, run: Run | None, names: Sequence[str]) -> None:
    """Delete files, and the folders of a disk that are empty then."""
    folder = ledger.folder
    at_once(folder.delete, [name for name in names if name != LEASE])  # that is ours now
    if folder.is_local:
        for path, _, _ in os.walk(folder.path(STATE), topdown=False):
            folder.drop_if_empty(os.path.relpath(path, folder.root))
    if run is not None:
        state = ledger.scan()
        ledger.drop_markers(state, ledger.reconcile(run, state))


def _lines(removable: Removable, sizes: Mapping[str, int], is_deleted: bool) -> Iterator[str]:
    for reason, names in removable.by_reason.items():
        num_bytes = sum(sizes.get(name, 0) for name in names)
        yield f"{reason}: {count(len(names), 'file')}, {format_bytes(num_bytes)}"
        yield f"    {name_some(names)}"
    waiting = sum(removable.waiting.values())
    if waiting:
        yield f"kept: {count(waiting, 'fragment')} of a retry that was stopped; blip2 retry goes on with them"
    total = f"{count(len(removable.names), 'file')}, {format_bytes(sum(sizes.values()))}"
    if is_deleted:
        yield f"deleted: {total}"
    elif removable.names:
        yield f"to be deleted: {total}; give --yes to delete them"
    else:
        yield "there is nothing to delete"
