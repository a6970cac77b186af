"""What does not stay in memory comes back as it was, and no file outlives it."""

from __future__ import annotations

import os
import pickle

import pytest

from pipeline.storage import packed_texts, spill
from pipeline.storage.packed_texts import PackedTexts
from pipeline.storage.spill import Spill, Spilled, UnnamedFile
from pipeline.storage.whole_files import WholeFile


def test_what_comes_after_the_first_bytes_is_in_files(monkeypatch):
    monkeypatch.setattr(spill, "FILE_BYTES", 100)
    contents = [os.urandom(size) for size in (0, 1, 60, 60, 0, 300, 7)]
    keeper = Spill(memory_bytes=61)
    kept = [keeper.keep(content) for content in contents]
    assert [isinstance(one, Spilled) for one in kept] == [False] * 3 + [True] * 4
    assert [bytes(one) for one in kept] == contents


def test_a_file_is_closed_when_nothing_in_it_is_of_use(monkeypatch):
    closed: list[int] = []
    close = os.close

    def note(descriptor: int) -> None:
        closed.append(descriptor)
        close(descriptor)

    monkeypatch.setattr(os, "close", note)
    monkeypatch.setattr(spill, "FILE_BYTES", 100)
    keeper = Spill(memory_bytes=0)
    kept = [keeper.keep(bytes([n]) * 100) for n in range(4)]
    opened = [one.file._descriptor for one in kept if isinstance(one, Spilled)]
    del kept[0]
    assert closed == opened[:1] and bytes(kept[0]) == b"\1" * 100
    del kept
    assert sorted(closed) == sorted(opened[:3])  # the keeper has the last one
    del keeper
    assert sorted(closed) == sorted(opened)


def test_a_forked_child_writes_to_a_file_of_its_own(monkeypatch):
    keeper = Spill(memory_bytes=0)
    first, second = keeper.keep(b"first"), keeper.keep(b"second")
    monkeypatch.setattr(os, "getpid", lambda: 1)
    of_child = [keeper.keep(b"child"), keeper.keep(b"again")]
    assert isinstance(first, Spilled) and isinstance(second, Spilled) and second.file is first.file
    files = {one.file for one in of_child if isinstance(one, Spilled)}
    assert len(files) == 1 and first.file not in files


def test_without_room_the_bytes_stay_in_memory(monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    keeper = Spill(memory_bytes=0)
    first = keeper.keep(b"first")
    monkeypatch.setattr(os, "pwrite", refuse)
    assert keeper.keep(b"second") == b"second" and bytes(first) == b"first"


def test_a_file_that_was_cut_is_an_error_and_not_other_bytes(tmp_path, monkeypatch):
    kept = Spill(memory_bytes=0).keep(b"content")
    monkeypatch.setattr(os, "pread", lambda *_: b"")
    with pytest.raises(OSError, match="has lost its content"):
        bytes(kept)


def test_a_cut_file_does_not_end_early():
    """A whole file of a web server was taken for a shorter one, without a word."""
    file = UnnamedFile()
    file.append(b"content")
    reader = WholeFile(file)
    assert reader.read(7) == b"content" and reader.read(1) == reader.read() == b""
    os.truncate(file._descriptor, 4)
    reader.seek(0)
    assert reader.read(7) == b"cont" and reader.read(0) == b""
    with pytest.raises(OSError, match="has lost its content"):
        reader.read(3)


def test_texts_in_files_are_the_texts(monkeypatch):
    in_memory = PackedTexts(["a", "b", "ä"])
    monkeypatch.setattr(packed_texts, "_spill", Spill(memory_bytes=0))
    monkeypatch.setattr(packed_texts, "_unpack", packed_texts._unpack.__wrapped__)  # which keeps nothing
    in_file, other = PackedTexts(["a", "b", "ä"]), PackedTexts(["a", "b"])
    assert isinstance(in_file._packed, Spilled)
    assert in_file == in_memory and hash(in_file) == hash(in_memory) and in_file != other
    assert list(in_file) == ["a", "b", "ä"]
    assert list(pickle.loads(pickle.dumps(in_file))) == ["a", "b", "ä"]
