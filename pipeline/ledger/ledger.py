"""The ledger: a run's state in its output folder, enough to go on after any death.

    <output>/<shard>.parquet       one file per finished shard, whole or not there
    <output>/_blip2/run.json       fingerprint and settings, written last: where it is, a run has begun
    <output>/_blip2/shards.jsonl.gz    the shard list, made once
    <output>/_blip2/ends/          how reading a shard ended: its number of rows, until it is committed
    <output>/_blip2/fragments/     finished rows on their way into a shard's file
    <output>/_blip2/lease.json     the driver at work

State is the union of finished files and fragments; nothing else has to be right for a resume.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.inputs.reader import ShardReport, ShardWork
from pipeline.inputs.shards import Shard, with_secrets, without_secrets
from pipeline.ledger.fragments import FRAGMENTS, Fragment, parse_fragment, rows_in
from pipeline.ledger.rowset import RowSet
from pipeline.settings.fingerprint import Fingerprint
from pipeline.storage.folder import ASIDE, PROBE, Folder
from pipeline.storage.retrying import retry_on_oserror

STATE = "_blip2"
RUN = f"{STATE}/run.json"
SHARDS = f"{STATE}/shards.jsonl.gz"
SHARD_REPORTS = f"{STATE}/ends"
PLAN_FOLDERS = f"{STATE}/plan-"
"""Begins the folders in which `plan` times writing."""
SUFFIX = ".parquet"


@dataclass(frozen=True)
class Run:
    """What a run is: written once, when it begins."""

    fingerprint: Fingerprint
    settings: Mapping[str, Any]
    """The command's settings as plain values, so that `retry` and `status` need the output alone."""
    shards: tuple[Shard, ...]


def begin_run(folder: Folder, run: Run) -> None:
    kept = (replace(shard, root=without_secrets(shard.root)) for shard in run.shards)
    lines = "".join(json.dumps(asdict(shard)) + "\n" for shard in kept)
    folder.put(SHARDS, gzip.compress(lines.encode(), mtime=0))
    record = {"fingerprint": run.fingerprint.parts, "settings": run.settings}
    folder.put(RUN, json.dumps(record, indent=1).encode())


def load_run(folder: Folder, inputs: Sequence[str] = ()) -> Run | None:
    """The run that was begun in a folder, or None.

    Args:
        inputs: what the shards stand below, with the passwords and options that the ledger does not keep.
    """
    record, shards = folder.get(RUN), folder.get(SHARDS)
    if record is None or shards is None:
        return None
    values = json.loads(record)
    return Run(
        fingerprint=Fingerprint(values["fingerprint"]),
        settings=values["settings"],
        shards=tuple(
            with_secrets(Shard(**json.loads(line)), inputs) for line in gzip.decompress(shards).splitlines()
        ),
    )


@dataclass(frozen=True)
class StoreShardReport:
    """Keeps a shard's report; called in the worker that has read it, twice where Ray reads it again.

    A worse reading does not replace a good one: what was there once was there.
    """

    folder: Folder

    def __call__(self, report: ShardReport) -> None:
        if not report.complete:
            known = retry_on_oserror(lambda: load_shard_report(self.folder, report.shard))
            if known is not None and (known.complete or known.num_rows > report.num_rows):
                return
        content = json.dumps(asdict(report)).encode()
        retry_on_oserror(lambda: self.folder.put(shard_report_name(report.shard), content))


def shard_report_name(shard: str) -> str:
    return f"{SHARD_REPORTS}/{shard}.json"


def load_shard_report(folder: Folder, shard: str) -> ShardReport | None:
    content = folder.get(shard_report_name(shard))
    return ShardReport(**json.loads(content)) if content else None


def shards_with_a_report(folder: Folder) -> set[str]:
    return {_shard_of_report(name) for name in folder.names(SHARD_REPORTS)}


def _shard_of_report(name: str) -> str:
    return name.removeprefix(f"{SHARD_REPORTS}/").removesuffix(".json")


@dataclass(frozen=True)
class State:
    """What one listing of the output shows."""

    finished: frozenset[str]
    """Shards whose file is there."""
    fragments: Mapping[str, Sequence[Fragment]]
    shard_reports: frozenset[str]
    """Shards that were read to their end and are not committed."""
    leftovers: tuple[str, ...]
    """Half-written files of drivers and workers that died, and what a killed plan has left."""


def scan_output(folder: Folder) -> State:
    """List the output once and sort what is there."""
    finished, shard_reports, leftovers = set(), set(), []
    fragments: dict[str, list[Fragment]] = {}
    for name in folder.names():
        if name.startswith(f"{FRAGMENTS}/"):
            fragment = parse_fragment(name)
            if fragment is not None:
                fragments.setdefault(fragment.shard, []).append(fragment)
        elif name.startswith(f"{SHARD_REPORTS}/"):
            shard_reports.add(_shard_of_report(name))
        elif name.startswith((f"{ASIDE}/", PLAN_FOLDERS, PROBE)):
            leftovers.append(name)
        elif is_result(name):
            finished.add(name.removesuffix(SUFFIX))
    return State(frozenset(finished), fragments, frozenset(shard_reports), tuple(leftovers))


def drop_markers(folder: Folder, run: Run, state: State) -> None:
    """Delete the empty objects that Arrow leaves in a store for emptied folders, once nothing is to do.

    Each later listing would bring one for every shard. Not while a run is at work: deleting a folder
    would take a fragment along that has just come.
    """
    is_over = {shard.name for shard in run.shards} <= state.finished and not (
        state.fragments or state.shard_reports
    )
    if is_over and not folder.is_local:
        folder.below(FRAGMENTS).erase()
        folder.below(SHARD_REPORTS).erase()


def is_result(name: str) -> bool:
    """Whether a file of the output is a finished shard's."""
    return name.endswith(SUFFIX) and not name.startswith(f"{STATE}/")


@dataclass
class ShardProgress:
    """How far one unfinished shard is."""

    shard: Shard
    done: RowSet
    report: ShardReport | None = None
    """How reading it ended, once it has."""

    @property
    def is_complete(self) -> bool:
        return self.report is not None and self.done.covers(self.report.num_rows)

    @property
    def work(self) -> ShardWork:
        """The rows still to do, fixed now: a read task that runs again reads the same."""
        stop = None if self.report is None else self.report.num_rows
        return ShardWork(shard=self.shard, missing=tuple(self.done.missing(stop)))


def unfinished(folder: Folder, run: Run, state: State) -> list[ShardProgress]:
    """The shards of a run that have no file yet, with what is known of each."""
    open_shards = [shard for shard in run.shards if shard.name not in state.finished]
    done = rows_in(
        folder, {s.name: state.fragments[s.name] for s in open_shards if s.name in state.fragments}
    )
    return [
        ShardProgress(
            shard=shard,
            done=done.get(shard.name, RowSet()),
            report=load_shard_report(folder, shard.name) if shard.name in state.shard_reports else None,
        )
        for shard in open_shards
    ]
