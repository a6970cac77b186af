"""`FileTable`: the files of a listing, sorted by path, in a few bytes each.

A folder may have 10^8 files, for which a dictionary needs some 30 GB. The table sorts parts of what a listing
yields, merges them, and holds blocks of packed paths.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, islice, pairwise, repeat
from typing import NamedTuple

from pipeline.storage.filesystems import join
from pipeline.storage.packed_texts import PackedTexts

BLOCK_FILES = 1000
SORTED_AT_ONCE = 256 * BLOCK_FILES
"""Files that are sorted in memory; they need some 50 MB. They fill their blocks."""
UNKNOWN = ""
"""The stamp of a file of which the storage tells nothing, or that is gone."""


class ListedFile(NamedTuple):
    """What a listing tells about a file: that of a store everything, that of a disk nothing."""

    size_bytes: int | None = None
    stamp: str = UNKNOWN


Entry = tuple[str, ListedFile]


class _Block(NamedTuple):
    paths: PackedTexts
    facts: PackedTexts | None
    """Size and stamp of each file; None if nothing is known of any."""

    @classmethod
    def of(cls, entries: list[Entry]) -> _Block:
        paths = PackedTexts(path for path, _ in entries)
        if all(listed == ListedFile() for _, listed in entries):
            return cls(paths, None)
        facts = (f"{'' if size is None else size}|{stamp}" for _, (size, stamp) in entries)
        return cls(paths, PackedTexts(facts))

    def entry(self, index: int) -> ListedFile:
        if self.facts is None:
            return ListedFile()
        size, _, stamp = self.facts[index].partition("|")
        return ListedFile(int(size) if size else None, stamp)

    def entries(self) -> Iterator[Entry]:
        if self.facts is None:
            return zip(self.paths[:], repeat(ListedFile()), strict=False)
        return ((path, self.entry(index)) for index, path in enumerate(self.paths[:]))


class FileTable(Mapping[str, ListedFile]):
    """Files by their paths, in the order of the paths; immutable."""

    def __init__(self, files: Iterable[Entry] = ()) -> None:
        """Sort and pack files; of two with the same path the later one counts."""
        rest, parts = iter(files), []
        while part := dict(islice(rest, SORTED_AT_ONCE)):
            # Paths alone compare faster than entries.
            parts.append(deque(_pack((path, part[path]) for path in sorted(part))))
        if any(left[-1].paths[-1] >= right[0].paths[0] for left, right in pairwise(parts)):
            self._hold(_pack(_last_of_each(_merged(parts))))
        else:
            self._hold(chain.from_iterable(parts))

    def _hold(self, blocks: Iterable[_Block]) -> None:
        self._blocks = list(blocks)
        self._firsts = [block.paths[0] for block in self._blocks]
        self._length = sum(len(block.paths) for block in self._blocks)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[str]:
        for block in self._blocks:
            yield from block.paths

    def __getitem__(self, path: str) -> ListedFile:
        position = bisect_right(self._firsts, path) - 1
        if position >= 0:
            block = self._blocks[position]
            paths = block.paths[:]  # Unpacked once.
            index = bisect_left(paths, path)
            if index < len(paths) and paths[index] == path:
                return block.entry(index)
        raise KeyError(path)

    def find(self, paths: Sequence[str]) -> list[ListedFile | None]:
        """Return what is known of some files, at least one; None for each that is not there.

        If the paths were packed from a listing that was the same, nothing is unpacked.
        """
        position = bisect_right(self._firsts, paths[0]) - 1
        if position >= 0:
            block = self._blocks[position]
            if block.paths == paths:
                return [listed for _, listed in block.entries()]
        return [self.get(path) for path in paths]

    def entries(self) -> Iterator[Entry]:
        """Yield all files in order; `items` would look up each."""
        for block in self._blocks:
            yield from block.entries()

    def slices(self, num_files: int) -> Iterator[tuple[Sequence[str], list[ListedFile]]]:
        """Yield the paths of `num_files` files at a time, the last ones fewer, and what is known of each.

        The paths of a full block stay packed as they are, so that both keepers share them.
        """
        lengths = [len(block.paths) for block in self._blocks]
        if {num_files}.issuperset(lengths[:-1]) and max(lengths, default=0) <= num_files:
            for block in self._blocks:
                yield block.paths, [listed for _, listed in block.entries()]
            return
        entries = self.entries()
        while part := list(islice(entries, num_files)):
            yield tuple(path for path, _ in part), [listed for _, listed in part]

    def select(self, is_wanted: Callable[[str], bool]) -> FileTable:
        """Return the files whose paths are wanted."""
        selected = FileTable()
        selected._hold(_pack(entry for entry in self.entries() if is_wanted(entry[0])))
        return selected

    def __or__(self, other: FileTable) -> FileTable:
        return FileTable(entry for table in (self, other) for entry in table.entries())


class FilesBelowRoots:
    """The files of several tables, each with the folder that its paths begin from.

    Args:
        tables: with the URIs of their roots, without secrets.
    """

    def __init__(self, tables: Iterable[tuple[str, FileTable]]) -> None:
        self._tables = list(tables)
        self._roots = {root for root, _ in self._tables}

    def find(self, root: str, files: Sequence[str]) -> list[ListedFile | None]:
        """Return what is known of some files below a root; None for each that is not there.

        The same files may be listed below another root: a folder that was named alone before, or the files of
        a folder one by one.
        """
        found: list[ListedFile | None] = []
        for table in (table for table_root, table in self._tables if table_root == root):
            of_table = table.find(files)
            if found:
                of_table = [new if old is None else old for old, new in zip(found, of_table, strict=True)]
            found = of_table
        found = found or [None] * len(files)
        if None in found and self._roots != {root}:
            paths = (join(root, file) for file in files)
            found = [self._by_path.get(p) if f is None else f for p, f in zip(paths, found, strict=True)]
        return found

    @cached_property
    def _by_path(self) -> FileTable:
        return FileTable(
            (join(root, file), entry) for root, table in self._tables for file, entry in table.entries()
        )


def _pack(entries: Iterator[Entry]) -> Iterator[_Block]:
    while some := list(islice(entries, BLOCK_FILES)):
        yield _Block.of(some)


def _merged(parts: list[deque[_Block]]) -> Iterator[Entry]:
    """Yield the entries of sorted parts in order, those with the same path in the order of their parts."""
    return heapq.merge(*map(_taken, parts), key=lambda entry: entry[0])


def _taken(part: deque[_Block]) -> Iterator[Entry]:
    """Yield the entries of a part, which gives up its blocks meanwhile."""
    while part:
        yield from list(part.popleft().entries())


def _last_of_each(entries: Iterator[Entry]) -> Iterator[Entry]:
    before: Entry | None = None
    for entry in entries:
        if before is not None and before[0] != entry[0]:
            yield before
        before = entry
    if before is not None:
        yield before
