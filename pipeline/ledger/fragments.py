"""Fragments: finished rows of one shard that wait for the other rows of its file.

A fragment is any set of finished rows. Its name says which rows it holds and ends in a digest of its content,
and it is written as a whole. Progress is the union of all fragments, so rows that were written twice, by a
repeated call or a straggler, do no harm.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.inputs.shards import Shard
from pipeline.ledger.layout import FRAGMENTS, output_name, parse_state_name, shard_report_name, state_name
from pipeline.rowset import RowSet, ranges_of
from pipeline.storage.filesystems import MAX_CONCURRENT_REQUESTS
from pipeline.storage.folder import Folder

ROWS = ".rows"
"""Ends the name of the folder with a shard's fragments."""
DIGEST_CHARS = 16
MAX_CHUNK_BYTES = 1 << 30
"""A chunk of strings has room for 2 GiB."""
_NAME = re.compile(r"^(?P<first>\d+)-(?P<last>\d+)-(?P<count>\d+)-[0-9a-f]+\.arrow$")


@dataclass(frozen=True)
class Fragment:
    """One fragment file, as its name describes it. Only one with gaps must be opened to know its rows."""

    shard: str
    name: str
    """Relative to the output folder."""
    first: int
    last: int
    """The last row, included."""
    count: int
    generation: int = 0
    """Of the shard when the rows were read; see `Shard.generation`."""

    @property
    def has_gaps(self) -> bool:
        return self.count != self.last - self.first + 1


def write_fragment(folder: Folder, rows: pa.Table, generation: int = 0) -> Fragment:
    """Write finished rows of one shard; writing the same rows again replaces the same file.

    Args:
        rows: at least one row in the output schema, all of one shard, each row number once.
        generation: of the shard that the rows were read from.
    """
    rows = _sorted(rows)
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


def is_intact(fragment: Fragment, content: bytes) -> bool:
    """Return whether a fragment's file has the content that its name promises."""
    return fragment.name.endswith(f"-{_digest(content)}.arrow")


def _sorted(rows: pa.Table) -> pa.Table:
    """Return rows in the order of their numbers, as one chunk if that has room for them."""
    if rows.nbytes < MAX_CHUNK_BYTES:
        return rows.sort_by("row").combine_chunks()
    order = pc.sort_indices(rows["row"]).to_pylist()
    return pa.concat_tables([rows.slice(position, 1) for position in order])


def _name(shard: str, generation: int, first: int, last: int, count: int, digest: str) -> str:
    return f"{_folder_of(shard, generation)}/{first:09d}-{last:09d}-{count}-{digest}.arrow"


def names_of_shard(shard: Shard) -> tuple[str, ...]:
    """Return the longest names that files of a shard have in the output."""
    name, generation = shard.name, shard.generation
    fragment = _name(name, generation, 0, 0, 10**9, "0" * DIGEST_CHARS)
    return output_name(name), shard_report_name(name, generation), fragment


def read_fragment(folder: Folder, name: str) -> pa.Table | None:
    """Return the rows of a fragment, or None when a commit has deleted it meanwhile."""
    content = folder.get(name)
    return None if content is None else pa.ipc.open_file(pa.py_buffer(content)).read_all()


def read_fragments(folder: Folder, fragments: Sequence[Fragment]) -> list[pa.Table | None]:
    """Read several fragments at the same time."""
    if not fragments:
        return []
    with ThreadPoolExecutor(min(MAX_CONCURRENT_REQUESTS, len(fragments))) as pool:
        return list(pool.map(lambda fragment: read_fragment(folder, fragment.name), fragments))


def parse_fragment(name: str) -> Fragment | None:
    """Return what the name of a file says, relative to the output, or None when it is no fragment."""
    of_shard, _, last = name.removeprefix(f"{FRAGMENTS}/").rpartition("/")
    match = _NAME.match(last)
    if not match or not of_shard.endswith(ROWS):
        return None
    shard, generation = parse_state_name(of_shard.removesuffix(ROWS))
    first, end, count = (int(match[group]) for group in ("first", "last", "count"))
    return Fragment(shard, name, first, end, count, generation)


def list_fragments(folder: Folder, shard: str, generation: int = 0) -> list[Fragment]:
    """Return the fragments of one shard."""
    found = (parse_fragment(name) for name in folder.names(_folder_of(shard, generation)))
    # The folder may contain the folder of another shard: those of "a" and "a.rows/b", for example.
    return [f for f in found if f is not None and (f.shard, f.generation) == (shard, generation)]


def _folder_of(shard: str, generation: int) -> str:
    return f"{FRAGMENTS}/{state_name(shard, generation)}{ROWS}"


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
    # In batches, so that the rows of all fragments never are in memory together.
    for start in range(0, len(with_gaps), MAX_CONCURRENT_REQUESTS):
        batch = with_gaps[start : start + MAX_CONCURRENT_REQUESTS]
        for fragment, rows in zip(batch, read_fragments(folder, batch), strict=True):
            if rows is not None:
                finished[fragment.shard].update(ranges_of(rows["row"].to_pylist()))
    return finished


def delete_fragments(folder: Folder, shard: str, fragments: Sequence[Fragment], generation: int = 0) -> None:
    """Delete fragments of a shard, and its folder of fragments when that is empty then."""
    if fragments:
        with ThreadPoolExecutor(min(MAX_CONCURRENT_REQUESTS, len(fragments))) as pool:
            list(pool.map(lambda fragment: folder.delete(fragment.name), fragments))
    folder.drop_if_empty(_folder_of(shard, generation))
