"""`Ledger`: the state of a run in its output folder, enough to resume after any process has died.

    <output>/<shard>.parquet           one file per finished shard, complete or not there
    <output>/_blip2/run.json           fingerprint and settings, written last: when it exists, a run has begun
    <output>/_blip2/shards.jsonl.gz    the list of shards, made once; if slices begin the run, its id is in
                                       the name of the list
    <output>/_blip2/fragments/         a folder for each unfinished shard: finished rows that wait for the
                                       others, and the report of how reading the shard ended
    <output>/_blip2/summaries/         what the footers of finished files say, a thousand to a file
    <output>/_blip2/lease.json         the driver at work; with --slice, one in _blip2/leases/ for each slice
    <output>/_blip2/attempts/          what each start did, for the report (`pipeline.attempts`)
    <output>/_blip2/log/               what the driver of each start has said
    <output>/_blip2/refused.json       why a submitted job was last refused, with a run or without one

The state is the union of finished files and fragments. Nothing else must be right for a resume.

This class says what can be done with an output. How it is done is in the modules that it calls.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from gzip import BadGzipFile
from json import JSONDecodeError

import pyarrow as pa

from pipeline.attempts.refusal import last_refusal
from pipeline.errors import OutputInUse
from pipeline.inputs.changes import InputChanges
from pipeline.inputs.reader import ShardReport
from pipeline.inputs.shards import RunSlice
from pipeline.ledger.commit import Summary, commit_shard, find_summary
from pipeline.ledger.fragments import (
    Fragment,
    read_shard_reports,
    rows_in,
    shared_folders,
    store_shard_report,
    write_fragment,
)
from pipeline.ledger.layout import RUN_FILE, parse_lease_name
from pipeline.ledger.lease import Holder, read_holders
from pipeline.ledger.reconcile import Reconciliation, compare_input, reconcile
from pipeline.ledger.retry import RowChoice, require_finished, to_retry
from pipeline.ledger.run_record import Run, read_run, revise_run, write_run
from pipeline.ledger.scan import OutputState, ShardProgress, scan_output, unfinished
from pipeline.ledger.summaries import keep_summaries, tidy_summaries, without_outdated
from pipeline.ledger.sweep import drop_markers, sweep
from pipeline.rowset import RowSet
from pipeline.schema import ROW_CONTRACT
from pipeline.storage.folder import Folder
from pipeline.storage.retrying import RETRY_FOR_S


@dataclass(frozen=True)
class Ledger:
    """The records in one output folder; picklable, so that workers write to it by themselves."""

    folder: Folder
    generations: Mapping[str, int] = field(default_factory=dict)
    """Generation of each shard that was begun again (`Shard.generation`); earlier results are left alone."""
    shared: frozenset[str] = frozenset()
    """Shards whose folders may hold folders of other shards; see `shared_folders`."""

    def __str__(self) -> str:
        """Return the URI of the folder, without secrets."""
        return str(self.folder)

    def with_retries(self, retry_for_s: float = RETRY_FOR_S) -> Ledger:
        """Return this ledger on a folder that repeats failed requests; see `Folder.with_retries`."""
        return replace(self, folder=self.folder.with_retries(retry_for_s))

    def of(self, run: Run) -> Ledger:
        """Return this ledger for the shards of a run as they are now."""
        generations = {s.name: s.generation for s in run.shards if s.generation}
        return replace(self, generations=generations, shared=shared_folders(run.shards))

    def begin(self, run: Run) -> bool:
        """Write the record of a run; return False if another slice has just begun one; see `write_run`."""
        return write_run(self.folder, run)

    def revise(self, run: Run, redone: Iterable[str]) -> None:
        """Store other shards for a run that has begun; see `revise_run`."""
        revise_run(self.folder, run, redone)

    def load(self, inputs: Sequence[str] = ()) -> Run | None:
        """Return the run that was begun here, or None.

        Args:
            inputs: the input URIs of the command, with the passwords and options that the record leaves out.

        Raises:
            ValueError: a newer version of this program has written the record, or it is damaged.
        """
        try:
            return read_run(self.folder, inputs)
        except (
            JSONDecodeError,
            UnicodeDecodeError,
            KeyError,
            TypeError,
            EOFError,
            BadGzipFile,
            zlib.error,
        ) as e:
            raise ValueError(
                f"the record of the run in {self} is damaged: {e}; restore {RUN_FILE} and the list of "
                "shards next to it from a copy, or give another --output"
            ) from e

    def require_run(self, inputs: Sequence[str] = ()) -> Run:
        """Return the run that was begun here, as `load` does.

        Raises:
            ValueError: there is none, or a newer version of this program has begun it.
        """
        run = self.load(inputs)
        if run is None:
            refusal = last_refusal(self.folder)
            said = "" if refusal is None else f"; {refusal}"
            raise ValueError(f"{self} holds no run{said}; pass the folder given as --output")
        return run

    def require_unrevised(self, run: Run) -> None:
        """Raise OutputInUse if a driver has stored other shards for a run since it was loaded.

        The lease is taken up to a minute after the run is loaded: another driver may have come and gone.
        """
        if run.listed is not None and self.folder.file(run.shard_list) != run.listed:
            raise OutputInUse(
                f"output must stay as it is while a command begins, got {self}, whose run has other shards "
                "since; run the same command again"
            )

    def scan(self) -> OutputState:
        """List the output once, and sort what is there."""
        state = scan_output(self.folder, self.generations)
        return without_outdated(self.folder, state, self.generations) if self.generations else state

    def unfinished(self, run: Run, state: OutputState) -> list[ShardProgress]:
        """Return the shards that have no file yet, with what is known of each."""
        return unfinished(self.folder, run, state)

    def require_finished(self, run: Run) -> None:
        """Raise ValueError unless the run is finished, so that its rows can be retried."""
        require_finished(self.folder, run, self.scan())

    def are_partial(self, shards: Iterable[str]) -> bool:
        """Return whether none of these shards has a file with all its rows."""
        return not any(s is not None and s.complete for s in (find_summary(self.folder, n) for n in shards))

    def to_retry(self, run: Run, state: OutputState, choice: RowChoice) -> list[ShardProgress]:
        """Return the shards of a finished run with rows to run again."""
        return to_retry(self.folder, run, state, choice)

    def rows_in(self, fragments: Mapping[str, Iterable[Fragment]]) -> dict[str, RowSet]:
        """Return which rows have reached a fragment, by shard."""
        return rows_in(self.folder, fragments)

    def write_fragment(self, rows: pa.Table) -> Fragment:
        """Write finished rows of one shard."""
        return write_fragment(self.folder, rows, self.generations.get(rows["shard"][0].as_py(), 0))

    def store_shard_report(self, report: ShardReport) -> None:
        """Store how reading a shard ended; safe to call twice."""
        store_shard_report(self.folder, report)

    def load_shard_reports(self, shards: Iterable[str]) -> list[ShardReport]:
        """Return the reports of these shards that are stored, read at the same time."""
        files = self.scan().shard_reports
        return read_shard_reports(self.folder, [files[name] for name in shards if name in files])

    def commit(
        self,
        report: ShardReport,
        metadata: Mapping[bytes, bytes],
        empty_schema: pa.Schema = ROW_CONTRACT,
    ) -> Summary | None:
        """Merge the file and the fragments of a shard into its file; see `commit_shard`."""
        is_shared = report.shard in self.shared
        return commit_shard(self.folder, report, metadata, empty_schema, is_shared=is_shared)

    def sweep(
        self,
        run: Run,
        state: OutputState,
        metadata: Mapping[bytes, bytes],
        empty_schema: pa.Schema = ROW_CONTRACT,
        is_slice: bool = False,
    ) -> OutputState:
        """Delete half-written files, and commit the shards that lack no row; see `sweep`."""
        commit = partial(self.commit, metadata=metadata, empty_schema=empty_schema)
        return sweep(self.folder, run, state, commit, is_slice)

    def drop_markers(self, state: OutputState, done: Reconciliation) -> None:
        """Delete the empty objects that a store keeps for emptied folders, when all shards are finished."""
        drop_markers(self.folder, state, done)

    def reconcile(self, run: Run, state: OutputState) -> Reconciliation:
        """Compare the shards of the run with their files."""
        return reconcile(self.folder, run.shards, state)

    def keep_summaries(self, summaries: Iterable[Summary]) -> None:
        """Store summaries of shards that were just committed, for `reconcile`."""
        keep_summaries(self.folder, summaries)

    def tidy_summaries(self, state: OutputState, done: Reconciliation) -> None:
        """Keep the summaries of all finished shards in few files; see `tidy_summaries`."""
        tidy_summaries(self.folder, state, done.summaries, done.unkept)

    def compare_input(self, run: Run, inputs: Sequence[str] = ()) -> InputChanges:
        """Compare the shards of the run with what its input holds now; see `reconcile.compare_input`."""
        return compare_input(self.folder, run, inputs)

    def drivers(self) -> dict[RunSlice | None, Holder]:
        """Return the drivers that hold a lease, dead or alive, by their slice; None is the whole run."""
        return {parse_lease_name(name): holder for name, holder in read_holders(self.folder).items()}
