"""The folder of an unfinished shard: its fragments, and the report of how reading it ended.

A fragment is any set of finished rows of one shard. Its name says which rows it holds and ends in a digest of
its content, and it is written as a whole. Progress is the union of all fragments, so rows that were written
twice, by a repeated call or a straggler, do no harm.

A shard report says how reading the shard ended, and so how many rows it has. The worker that reads a shard
stores its report; the commit of the shard deletes the whole folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import pyarrow as pa

from pipeline.inputs.reader import ShardReport
from pipeline.inputs.shards import Shard
from pipeline.ledger.layout import (
    ROWS,
    folder_of_shard,
    is_report_of_change,
    output_name,
    parse_folder_of_shard,
    parse_shard_report_name,
    parse_state_name,
    shard_report_name,
)
from pipeline.rowset import Range, RowSet, ranges_of
from pipeline.storage.filesystems import at_once
from pipeline.storage.folder import Folder, WrittenFile

DIGEST_CHARS = 16
_NAME = re.compile(r"^(?P<first>\d+)-(?P<last>\d+)-(?P<count>\d+)-[0-9a-f]+\.arrow$")


@dataclass(frozen=True)
class Fragment:
    """One fragment file, as its name describes it. Only files with gaps are opened to learn their rows."""

    shard: str
    name: str
    """Relative to the output folder."""
    first: int
    last: int
    """The last row, included."""
    count: int
    generation: int = 0
    """Generation of the shard when the rows were read; see `Shard.generation`."""

    @property
    def has_gaps(self) -> bool:
        return self.count != self.last - self.first + 1


def write_fragment(folder: Folder, rows: pa.Table, generation: int = 0) -> Fragment:
    """Write finished rows of one shard; writing the same rows again replaces the same file.

    Args:
        rows: at least one row in the output schema, all of one shard, each row number once; less than 2 GiB,
            the limit of one chunk of strings.
        generation: of the shard that the rows were read from.
    """
    rows = rows.sort_by("row").combine_chunks()
    numbers = rows["row"]
    shard = rows["shard"][0].as_py()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, rows.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(rows)
    content = sink.getvalue()
    digest = _digest(content)
    first, last = numbers[0].as_py(), numbers[-1].as_py()
    name = _name(shard, generation, first, last, len(numbers), digest)
    folder.put(name, content)
    return Fragment(shard, name, first, last, len(numbers), generation)


def _digest(content: bytes | pa.Buffer) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGEST_CHARS]


def is_intact(name: str, content: bytes) -> bool:
    """Return whether a fragment's file has the content that its name promises."""
    return name.endswith(f"-{_digest(content)}.arrow")


def _name(shard: str, generation: int, first: int, last: int, count: int, digest: str) -> str:
    return f"{folder_of_shard(shard, generation)}/{first:09d}-{last:09d}-{count}-{digest}.arrow"


def names_of_shard(shard: Shard) -> tuple[str, ...]:
    """Return the longest names that files of a shard have in the output."""
    name, generation = shard.name, shard.generation
    fragment = _name(name, generation, 0, 0, 10**9, "0" * DIGEST_CHARS)
    return output_name(name), shard_report_name(name, generation), fragment


def read_fragment(folder: Folder, name: str) -> pa.Table | None:
    """Return the rows of a fragment, or None when a commit has deleted it meanwhile.

    Raises:
        pa.ArrowInvalid: the file is damaged; the message names it.
    """
    content = folder.get_listed(name)
    if content is None:
        return None
    if not is_intact(name, content):
        raise pa.ArrowInvalid(
            f"{name} in {folder} is damaged, its content is not what was written; delete this file, and the "
            "same command makes its rows again, or blip2 retry if its shard is partial"
        )
    return pa.ipc.open_file(pa.py_buffer(content)).read_all()


def parse_fragment(name: str) -> Fragment | None:
    """Parse a file name relative to the output; return None if it is not a fragment's."""
    folder, _, last = name.rpartition("/")
    match, found = _NAME.match(last), parse_folder_of_shard(folder)
    if not match or found is None:
        return None
    shard, generation = found
    first, end, count = (int(match[group]) for group in ("first", "last", "count"))
    return Fragment(shard, name, first, end, count, generation)


@dataclass(frozen=True)
class ShardFiles:
    """What the folder of an unfinished shard holds."""

    folder: str
    fragments: tuple[Fragment, ...] = ()
    reports: tuple[str, ...] = ()
    """Names of its reports, the latest first."""

    @property
    def report(self) -> str | None:
        """Name of the latest report."""
        return self.reports[0] if self.reports else None


def list_shard_files(folder: Folder, shard: str, generation: int) -> ShardFiles:
    """List the folder of an unfinished shard."""
    own, below = (shard, generation), folder_of_shard(shard, generation)
    files = folder.files(below)
    found = [f for file in files if (f := parse_fragment(file.name)) is not None]
    fragments = tuple(f for f in found if (f.shard, f.generation) == own)
    reports = [file for file in files if parse_shard_report_name(file.name) == own]
    latest_first = sorted(reports, key=report_order, reverse=True)
    return ShardFiles(below, fragments, tuple(file.name for file in latest_first))


def report_order(file: WrittenFile) -> tuple[float, bool]:
    """Return the sort key of a shard's reports: the latest counts; of two at once, the one of a change."""
    return file.written, is_report_of_change(file.name)


def rows_in(folder: Folder, fragments: Mapping[str, Iterable[Fragment]]) -> dict[str, RowSet]:
    """Return which rows have reached a fragment, by shard; only fragments with gaps are opened."""
    finished: dict[str, RowSet] = {shard: RowSet() for shard in fragments}
    with_gaps: list[Fragment] = []
    for shard, of_shard in fragments.items():
        for fragment in of_shard:
            if fragment.has_gaps:
                with_gaps.append(fragment)
            else:
                finished[shard].add(fragment.first, fragment.last + 1)

    def ranges_in(fragment: Fragment) -> list[Range]:
        rows = read_fragment(folder, fragment.name)
        return [] if rows is None else list(ranges_of(rows["row"].to_pylist()))

    for fragment, ranges in zip(with_gaps, at_once(ranges_in, with_gaps), strict=True):
        finished[fragment.shard].update(ranges)
    return finished


def shared_folders(shards: Iterable[Shard]) -> frozenset[str]:
    """Return the names of shards whose folders may hold those of others: "a" if there is "a.rows/b"."""
    found = set()
    for shard in shards:
        above, *rest = shard.name.split(f"{ROWS}/")
        for part in rest:
            found.add(parse_state_name(above)[0])
            above += f"{ROWS}/{part}"
    return frozenset(found)


def delete_shard_files(
    folder: Folder, files: ShardFiles, num_rows: int, is_shared: bool, may_improve: bool
) -> None:
    """Delete the files of a shard that has been committed.

    The files that were merged are deleted by name. What another process writes meanwhile stays, and the next
    sweep merges it. A store that cannot delete several files in one request needs three requests for a file
    and five for a folder: there, the whole folder is deleted if nothing that arrives meanwhile can be of use.

    Args:
        files: the files that the commit found.
        num_rows: fragments with later rows stay.
        is_shared: whether the folder may hold those of other shards.
        may_improve: whether rows written meanwhile may be better than those of the file.
    """
    merged = [fragment.name for fragment in files.fragments if fragment.last < num_rows]
    if len(merged) == len(files.fragments) and not (is_shared or may_improve or folder.is_local):
        if not folder.delete_at_once([*merged, *files.reports]):
            folder.erase(files.folder)
        return
    folder.delete_files(merged)
    folder.delete_files(files.reports)  # after the fragments, which are of no use without a report
    folder.drop_if_empty(files.folder)


def store_shard_report(folder: Folder, report: ShardReport) -> None:
    """Store the report of a shard if it replaces the stored one; safe to call twice."""
    if not (report.complete or report.changed):
        known = read_shard_report(folder, shard_report_name(report.shard, report.generation))
        if not report.replaces(known):
            return
    name = shard_report_name(report.shard, report.generation, report.changed)
    folder.put(name, json.dumps(asdict(report)).encode())


def read_shard_report(folder: Folder, name: str) -> ShardReport | None:
    """Return the report in a file, or None when a commit has deleted it meanwhile.

    A damaged report counts as none: its shard is read again, which stores another.
    """
    content = folder.get(name)
    try:
        return ShardReport(**json.loads(content)) if content else None
    except (ValueError, TypeError):
        return None


def read_shard_reports(folder: Folder, names: Iterable[str]) -> list[ShardReport]:
    """Return the reports in several files, read at the same time; those that are gone are left out."""
    return [r for r in at_once(lambda name: read_shard_report(folder, name), names) if r is not None]
