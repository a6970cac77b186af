"""Scan an output folder: list it once, sort what is there, and say which rows are left to do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from pipeline.inputs.reader import ShardReport, ShardWork
from pipeline.inputs.shards import Shard
from pipeline.ledger.fragments import Fragment, parse_fragment, read_shard_reports, report_order, rows_in
from pipeline.ledger.layout import (
    FRAGMENTS,
    OLD_SHARD_REPORTS,
    PLAN_FOLDERS,
    SUFFIX,
    SUMMARIES,
    is_result,
    is_shard_list,
    parse_shard_report_name,
)
from pipeline.ledger.run_record import Run
from pipeline.rowset import RowSet
from pipeline.storage.folder import ASIDE, PROBE, Folder, WrittenFile


@dataclass(frozen=True)
class OutputState:
    """What one listing of the output shows."""

    fragments: Mapping[str, Sequence[Fragment]]
    """Fragments by shard."""
    shard_reports: Mapping[str, str]
    """The file with the report of each shard that was read to its end and is not committed."""
    leftovers: tuple[str, ...]
    """Half-written files of drivers and workers that died, the files of a `plan` that was killed, and what
    was made of a shard's content before the shard was begun again."""
    written: Mapping[str, WrittenFile]
    """The file of each finished shard."""
    summaries: tuple[WrittenFile, ...]
    """The files with kept summaries; see `pipeline.ledger.summaries`."""
    shard_lists: tuple[str, ...] = ()
    """The lists of shards. A driver that died as it began a run has left one that no run reads."""

    @property
    def finished(self) -> Set[str]:
        """Shards that have their file."""
        return self.written.keys()

    def unread_lists(self, run: Run | None) -> list[str]:
        """Return the lists of shards that the run does not read.

        Args:
            run: None if there is none. If there are rows without a run, its record is lost, and every list is
                kept, because one may be its own.
        """
        if run is None:
            return [] if self.written or self.fragments else [*self.shard_lists]
        return [name for name in self.shard_lists if name != run.shard_list]

    def of_shards(self, shards: Set[str]) -> OutputState:
        """Return the state with the fragments and reports of all other shards as leftovers.

        A late worker may write such a fragment after a table was begun again and divided into other parts.
        """
        others = [f.name for name, found in self.fragments.items() if name not in shards for f in found]
        others += [report for name, report in self.shard_reports.items() if name not in shards]
        return replace(
            self,
            fragments={name: found for name, found in self.fragments.items() if name in shards},
            shard_reports={name: file for name, file in self.shard_reports.items() if name in shards},
            leftovers=(*self.leftovers, *others),
        )

    def without(self, redone: Iterable[str]) -> OutputState:
        """Return the state after the files of shards were deleted."""
        gone = set(redone)
        return replace(self, written={name: file for name, file in self.written.items() if name not in gone})


def scan_output(folder: Folder, generations: Mapping[str, int] | None = None, under: str = "") -> OutputState:
    """List the output once, and sort its files.

    Args:
        generations: of the shards that were begun again; all others have generation 0.
        under: the folder to list; default: all.
    """
    generations = generations or {}
    written: dict[str, WrittenFile] = {}
    summaries: list[WrittenFile] = []
    reports: dict[str, WrittenFile] = {}
    leftovers: list[str] = []
    shard_lists: list[str] = []
    fragments: dict[str, list[Fragment]] = {}
    for file in folder.files(under):
        name = file.name
        if name.startswith((f"{FRAGMENTS}/", f"{OLD_SHARD_REPORTS}/")):
            fragment, about = parse_fragment(name), parse_shard_report_name(name)
            if fragment is not None:
                about = fragment.shard, fragment.generation
            if about is None:
                continue
            shard, generation = about
            if generation != generations.get(shard, 0):
                leftovers.append(name)
            elif fragment is not None:
                fragments.setdefault(shard, []).append(fragment)
            else:
                reports[shard] = max(reports.get(shard, file), file, key=report_order)
        elif name.startswith((f"{ASIDE}/", PLAN_FOLDERS, PROBE)):
            leftovers.append(name)
        elif name.startswith(f"{SUMMARIES}/"):
            summaries.append(file)
        elif is_shard_list(name):
            shard_lists.append(name)
        elif is_result(name):
            written[name.removesuffix(SUFFIX)] = file
    shard_reports = {shard: file.name for shard, file in reports.items()}
    return OutputState(
        fragments, shard_reports, tuple(leftovers), written, tuple(summaries), tuple(shard_lists)
    )


@dataclass
class ShardProgress:
    """The progress of one shard."""

    shard: Shard
    done: RowSet
    """Rows that need no more work."""
    report: ShardReport | None = None
    """How reading the shard ended, once it has."""

    @property
    def is_complete(self) -> bool:
        return self.report is not None and self.done.covers(self.report.num_rows)

    @property
    def work(self) -> ShardWork:
        """The rows still to do, fixed now: a read task that runs again must read the same rows."""
        stop = None if self.report is None else self.report.num_rows
        return ShardWork(shard=self.shard, missing=tuple(self.done.missing(stop)))


def unfinished(folder: Folder, run: Run, state: OutputState) -> list[ShardProgress]:
    """Return the shards of a run that have no file yet, with what is known of each."""
    open_shards = [shard for shard in run.shards if shard.name not in state.finished]
    names = {shard.name for shard in open_shards}
    done = rows_in(folder, {name: found for name, found in state.fragments.items() if name in names})
    files = [file for name, file in state.shard_reports.items() if name in names]
    reports = {report.shard: report for report in read_shard_reports(folder, files)}
    return [
        ShardProgress(shard, done.get(shard.name, RowSet()), reports.get(shard.name)) for shard in open_shards
    ]
