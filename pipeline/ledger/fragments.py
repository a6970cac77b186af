"""Fragments: finished rows of one shard on their way into its file.

A fragment is any set of finished rows, named by the rows it holds and by its content, put in place
whole. Progress is the union of all fragments, so that duplicates and stragglers dissolve.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from pipeline.ledger.rowset import RowSet, runs
from pipeline.storage.folder import Folder

FRAGMENTS = "_blip2/fragments"
ROWS = ".rows"
"""Ends the folder of a shard's fragments: no name here may end in .parquet, or globs would find it."""
AT_ONCE = 16
"""Requests to a store at the same time."""
_NAME = re.compile(r"^(?P<first>\d+)-(?P<last>\d+)-(?P<count>\d+)-[0-9a-f]+\.arrow$")


@dataclass(frozen=True)
class Fragment:
    """One fragment file; what its name says suffices to plan, unless its rows have gaps."""

    shard: str
    name: str
    """Relative to the output folder."""
    first: int
    last: int
    count: int

    @property
    def has_gaps(self) -> bool:
        return self.count != self.last - self.first + 1


def write_fragment(folder: Folder, rows: pa.Table) -> Fragment:
    """Put finished rows of one shard in place.

    Args:
        rows: at least one row in the output schema, all of one shard, each row number once.
    """
    rows = rows.sort_by("row").combine_chunks()
    numbers = rows["row"]
    shard = rows["shard"][0].as_py()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, rows.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(rows)
    content = sink.getvalue()
    digest = hashlib.sha256(content).hexdigest()[:16]
    first, last = numbers[0].as_py(), numbers[-1].as_py()
    name = f"{FRAGMENTS}/{shard}{ROWS}/{first:09d}-{last:09d}-{len(numbers)}-{digest}.arrow"
    folder.put(name, content)
    return Fragment(shard, name, first, last, len(numbers))


def read_fragment(folder: Folder, name: str) -> pa.Table | None:
    """The rows of a fragment, or None where a commit has deleted it meanwhile."""
    content = folder.get(name)
    return None if content is None else pa.ipc.open_file(pa.py_buffer(content)).read_all()


def read_fragments(folder: Folder, fragments: Sequence[Fragment]) -> list[pa.Table | None]:
    """Several at the same time: a store answers each after tens of milliseconds."""
    if not fragments:
        return []
    with ThreadPoolExecutor(min(AT_ONCE, len(fragments))) as pool:
        return list(pool.map(lambda fragment: read_fragment(folder, fragment.name), fragments))


def parse_fragment(name: str) -> Fragment | None:
    """What the name of a file below the output says, or None when it is no fragment."""
    of_shard, _, last = name.removeprefix(f"{FRAGMENTS}/").rpartition("/")
    match = _NAME.match(last)
    if not match or not of_shard.endswith(ROWS):
        return None
    numbers = (int(match[group]) for group in ("first", "last", "count"))
    return Fragment(of_shard.removesuffix(ROWS), name, *numbers)


def list_fragments(folder: Folder, shard: str) -> list[Fragment]:
    """The fragments of one shard."""
    found = (parse_fragment(name) for name in folder.names(f"{FRAGMENTS}/{shard}{ROWS}"))
    # A folder may hold another shard's: "a" and "a.rows/b".
    return [fragment for fragment in found if fragment is not None and fragment.shard == shard]


def rows_in(folder: Folder, fragments: Mapping[str, Iterable[Fragment]]) -> dict[str, RowSet]:
    """Which rows have reached a fragment, by shard; only fragments with gaps are opened."""
    finished: dict[str, RowSet] = {shard: RowSet() for shard in fragments}
    gappy: list[Fragment] = []
    for shard, of_shard in fragments.items():
        for fragment in of_shard:
            if fragment.has_gaps:
                gappy.append(fragment)
            else:
                finished[shard].add(fragment.first, fragment.last + 1)
    for start in range(0, len(gappy), AT_ONCE):
        some = gappy[start : start + AT_ONCE]
        for fragment, rows in zip(some, read_fragments(folder, some), strict=True):
            if rows is not None:
                finished[fragment.shard].update(runs(rows["row"].to_pylist()))
    return finished


def delete_fragments(folder: Folder, shard: str, fragments: Sequence[Fragment]) -> None:
    if fragments:
        with ThreadPoolExecutor(min(AT_ONCE, len(fragments))) as pool:
            list(pool.map(lambda fragment: folder.delete(fragment.name), fragments))
    folder.drop_if_empty(f"{FRAGMENTS}/{shard}{ROWS}")
