"""The files of a listing in little memory: a file that is lost, or comes twice, is a row that does."""

from __future__ import annotations

import json
import pickle
import random
import tracemalloc
from itertools import chain

import pytest

from pipeline.inputs.shards import PACKED_FROM, Shard
from pipeline.storage import file_table
from pipeline.storage.file_table import FilesBelowRoots, FileTable, ListedFile
from pipeline.storage.packed_texts import PackedTexts

AWKWARD = ["", "a b", "a\nb", "a\tb", "ä", "\udcff", "|", "x" * 5000]


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(file_table, "SORTED_AT_ONCE", 7)
    monkeypatch.setattr(file_table, "BLOCK_FILES", 3)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("num_files", [0, 1, 3, 7, 8, 50])
def test_a_table_has_the_files_of_a_dictionary_in_order(num_files, is_sorted):
    files = [
        (f"{n:02d}", ListedFile(n if n % 3 else None, f"{n}@5" if n % 2 else "")) for n in range(num_files)
    ]
    if not is_sorted:
        files += [(path, ListedFile(9)) for path, _ in files[::4]]  # The later one counts.
        random.Random(num_files).shuffle(files)
    table = FileTable(iter(files))
    assert list(table.entries()) == sorted(dict(files).items())
    assert (list(table), len(table), dict(table)) == (sorted(dict(files)), len(dict(files)), dict(files))
    assert all(path in table for path, _ in files)
    assert not any(path in table for path in ("", "/", "03x", "~"))
    odd = table.select(lambda path: int(path) % 2 == 1)
    assert list(odd) == [path for path in table if int(path) % 2]
    assert dict(odd | table) == dict(table)
    for size in (2, 3, 100):
        slices = [list(zip(paths, listed, strict=True)) for paths, listed in table.slices(size)]
        assert [len(part) for part in slices[:-1]] == [size] * (len(slices) - 1)
        assert list(chain.from_iterable(slices)) == list(table.entries())


@pytest.mark.usefixtures("small_parts")
def test_files_are_found_by_a_part_of_the_same_listing_and_by_any_other():
    files = {f"{number:02d}": ListedFile(number, f"{number}@1") for number in range(20)}
    table = FileTable(files.items())
    for start in range(19):
        for paths in ([f"{number:02d}" for number in range(start, start + 3)], ["04", "x", "01"]):
            wanted = [files.get(path) for path in paths]
            assert table.find(paths) == table.find(PackedTexts(paths)) == wanted
    assert FileTable().find(["a"]) == [None]


def test_files_are_found_below_another_root_than_they_were_listed_from():
    """A resume may name the files of a folder one by one, or a folder that was a part of its input alone."""
    inner, outer = ListedFile(1, "inner"), ListedFile(2, "outer")
    now = FilesBelowRoots(
        [("/in", FileTable({"a": outer}.items())), ("/in/b", FileTable({"c": inner}.items()))]
    )
    assert now.find("/in", ["a", "b/c", "d"]) == [outer, inner, None]
    assert now.find("/in/b", ["c", "a"]) == [inner, None]
    assert now.find("/", ["in/a", "in/b/c", "c"]) == [outer, inner, None]
    assert FilesBelowRoots([]).find("/in", ["a"]) == [None]


def test_names_of_every_kind_come_back():
    texts = [*AWKWARD, *AWKWARD]
    packed = PackedTexts(texts)
    assert (list(packed), packed[1:3], packed[-1]) == (texts, ("a b", "a\nb"), texts[-1])
    assert (list(PackedTexts([])), list(PackedTexts([""])), len(PackedTexts([""]))) == ([], [""], 1)
    assert list(FileTable((text, ListedFile()) for text in AWKWARD)) == sorted(AWKWARD)


def test_a_shard_of_many_files_is_stored_as_before():
    """A run of an earlier version resumes, and the other way round."""
    names = [f"{number:04d}.jpg" for number in range(PACKED_FROM)]
    shard = Shard(name="x~0-99", format="folder", root="/in", files=names, stamps=names)
    assert isinstance(shard.files, PackedTexts)
    stored = json.loads(shard.to_json())
    assert stored["files"] == stored["stamps"] == names
    assert Shard(**stored) == shard and hash(Shard(**stored)) == hash(shard)


def test_a_table_of_many_files_needs_a_few_bytes_for_each(monkeypatch):
    """A dictionary needs 300; a folder of 10^8 images needed 30 GB before the job began."""
    monkeypatch.setattr(file_table, "SORTED_AT_ONCE", 200)
    monkeypatch.setattr(file_table, "BLOCK_FILES", 50)
    num_files = 8000
    tracemalloc.start()
    try:
        table = FileTable((f"{n * 7919 % num_files:030d}.jpg", ListedFile()) for n in range(num_files))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(table) == num_files
    assert len(pickle.dumps(table)) < 10 * num_files
    assert peak < 120 * num_files
