"""Processes die during a commit: whichever request is their last, no row is lost or doubled."""

from __future__ import annotations

import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any

import pyarrow.fs as pafs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.inputs.shards import Shard
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.run_record import Run
from pipeline.settings.fingerprint import Fingerprint
from pipeline.storage.folder import Folder
from tests.unit.ledger.test_fragments import committed_rows, report, rows

REQUESTS = ("_put_once", "_get_once", "_list_once", "_delete_once", "_erase_once")
PLACES = ("disk", "store")
SHARD = "0.tar"


@pytest.fixture(scope="module", autouse=True)
def _in_a_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp("ledgers"))
    yield
    tempfile.tempdir = before


class Died(BaseException):
    """The process has been killed."""


def make_ledger(place: str, *shards: str) -> tuple[Ledger, Run]:
    """Return the ledger of a run in a new folder, on disk or in a store in memory."""
    path = tempfile.mkdtemp()
    folder = Folder(path if place == "disk" else f"memory:/{path}")
    made = [Shard(name=name, format="webdataset", root="/in", files=(name,)) for name in shards]
    run = Run(Fingerprint({}), {}, tuple(made))
    return Ledger(folder).of(run), run


@contextmanager
def requests_seen_by(see: Callable[[str, Callable[[], object]], object]) -> Iterator[None]:
    """Have `see`, which gets the name of a request, carry out each request of all folders.

    Requests that a request itself makes are a part of it.
    """
    originals = {name: getattr(Folder, name) for name in REQUESTS}
    thread = threading.local()

    def through(name: str) -> Callable:
        def request(*args: Any, **kwargs: Any) -> object:
            if getattr(thread, "is_inside", False):
                return originals[name](*args, **kwargs)

            def carry_out() -> object:
                thread.is_inside = True
                try:
                    return originals[name](*args, **kwargs)
                finally:
                    thread.is_inside = False

            return see(name, carry_out)

        return request

    try:
        for name in REQUESTS:
            setattr(Folder, name, through(name))
        yield
    finally:
        for name, original in originals.items():
            setattr(Folder, name, original)


@contextmanager
def dying_at(number: int, folder: Folder, chance: random.Random) -> Iterator[None]:
    """Kill the process at its request `number`, carried out or not; a deletion may be half done."""
    numbers, lock, is_dead = count(), threading.Lock(), threading.Event()
    fragments = pafs.FileSelector(folder.path("_blip2/fragments"), allow_not_found=True, recursive=True)

    def see(name: str, request: Callable[[], object]) -> object:
        with lock:
            if is_dead.is_set():
                raise Died
            if next(numbers) != number:
                return request()
            is_dead.set()
            if name == "_erase_once":
                files = [file.path for file in folder.filesystem.get_file_info(fragments) if file.is_file]
                for file in chance.sample(files, chance.randint(0, len(files))):
                    folder.filesystem.delete_file(file)
            elif chance.random() < 0.5:
                request()
            raise Died

    with requests_seen_by(see):
        yield


def live(ledger: Ledger, run: Run, is_driver: bool, num_rows: int) -> None:
    """Do what a committer does with a complete shard, or a driver that starts."""
    if is_driver:
        ledger.sweep(run, ledger.scan(), {})
    else:
        ledger.commit(report(num_rows, SHARD), {})


def write_failed_and_ok(ledger: Ledger, word: str) -> None:
    """Write a failed and an ok copy of two rows; which one is listed first depends on the word."""
    ledger.write_fragment(rows([0, 1], SHARD, status="failed"))
    ledger.write_fragment(rows([0, 1], SHARD, word=word))
    ledger.store_shard_report(report(2, SHARD))


def statuses(ledger: Ledger) -> list[str]:
    return committed_rows(ledger.folder, SHARD)["status"].to_pylist()


@pytest.mark.parametrize("place", PLACES)
def test_a_commit_that_died_while_it_deleted_fragments_keeps_the_ok_row(place):
    """Its next run used to merge a failed copy alone, and to replace the file that had the ok row."""
    for death in count():
        for seed in range(6):
            ledger, run = make_ledger(place, SHARD)
            write_failed_and_ok(ledger, str(seed))
            try:
                with dying_at(death, ledger.folder, random.Random(seed)):
                    live(ledger, run, False, 2)
            except Died:
                live(ledger, run, False, 2)
            else:
                return
            live(ledger, run, True, 2)
            assert statuses(ledger) == ["ok", "ok"], (death, seed)


@contextmanager
def happens_at(number: int, action: Callable[[], object]) -> Iterator[list[str]]:
    """Run something after request `number`; yield the requests that were made."""
    made: list[str] = []
    lock, is_happening = threading.Lock(), threading.Event()

    def see(name: str, request: Callable[[], object]) -> object:
        if is_happening.is_set():
            return request()
        with lock:
            made.append(name)
            result = request()
            if len(made) == number + 1:
                is_happening.set()
                action()
                is_happening.clear()
            return result

    with requests_seen_by(see):
        yield made


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("outer", "inner"), [("a", "a.rows/b"), ("a/x", "a/x.rows/b.rows/c")])
def test_a_commit_deletes_no_row_of_a_shard_whose_folder_lies_in_its_own(place, outer, inner):
    """A fragment that arrived between the listing of the folder and its deletion used to be deleted too."""
    for arrival in count():
        ledger, _ = make_ledger(place, outer, inner)
        ledger.write_fragment(rows([0], outer))
        ledger.store_shard_report(report(1, outer))
        with happens_at(arrival, partial(ledger.write_fragment, rows([0], inner))) as made:
            assert ledger.commit(report(1, outer), {})
        if len(made) <= arrival:
            return
        state = ledger.scan()
        assert outer not in state.fragments
        assert len(state.fragments[inner]) == 1, arrival


@pytest.mark.parametrize("place", PLACES)
def test_a_row_that_arrives_while_its_shard_is_committed_is_kept(place):
    """A straggler's ok row used to be deleted with the folder, while the file had that row as failed."""
    for arrival in count():
        ledger, run = make_ledger(place, SHARD)
        ledger.write_fragment(rows([0], SHARD, status="failed"))
        ledger.store_shard_report(report(1, SHARD))
        with happens_at(arrival, partial(ledger.write_fragment, rows([0], SHARD))) as made:
            live(ledger, run, False, 1)
            state = ledger.scan()
            ledger.drop_markers(state, ledger.reconcile(run, state))
        if len(made) <= arrival:
            return
        live(ledger, run, True, 1)
        assert statuses(ledger) == ["ok"], (arrival, made)


@pytest.mark.parametrize("status", ["ok", "undecodable", "missing_image"])
def test_a_store_deletes_the_folder_of_a_shard_whole_if_no_row_may_improve(status):
    """The names of a hundred fragments cost 300 requests; deleting the folder costs five."""
    ledger, run = make_ledger("store", SHARD)
    for row in range(5):
        ledger.write_fragment(rows([row], SHARD, status=status))
    with happens_at(-1, lambda: None) as made:
        live(ledger, run, False, 5)
    assert ("_erase_once" in made, "_delete_once" in made) == (True, False), made


@pytest.mark.parametrize("place", PLACES)
def test_two_commits_at_the_same_time_keep_the_ok_row(place):
    """The ok row's fragment was gone, so the slower commit wrote the failed row over the other's file."""
    made = [""]
    for moment in count():
        if len(made) < moment:
            return
        for word in ("0", "1"):
            ledger, run = make_ledger(place, SHARD)
            write_failed_and_ok(ledger, word)
            # As in a job, the other commit may delete a fragment while a thread of this one reads it.
            ledger = ledger.with_retries(10.0)
            with happens_at(moment, partial(live, ledger, run, False, 2)) as made:
                live(ledger, run, False, 2)
            live(ledger, run, True, 2)
            assert statuses(ledger) == ["ok", "ok"], moment


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[list[tuple[list[int], str]]], list[tuple[bool, int]], int]:
    """Return rows of a shard, the fragments that arrive before each process, the processes, and a seed."""
    num_rows = draw(st.integers(1, 5))
    numbers = st.lists(st.integers(0, num_rows - 1), min_size=1, unique=True)
    fragments = st.lists(st.tuples(numbers, st.sampled_from(["ok", "failed"])), max_size=3)
    processes = draw(st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=5))
    arrivals = draw(st.lists(fragments, min_size=len(processes) + 1, max_size=len(processes) + 1))
    return num_rows, arrivals, processes, draw(st.integers(0, 99))


@pytest.mark.parametrize("place", PLACES)
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(history=histories())
def test_no_row_is_lost_or_doubled_wherever_processes_die(place, history):
    num_rows, arrivals, processes, seed = history
    chance = random.Random(seed)
    ledger, run = make_ledger(place, SHARD)
    ledger.store_shard_report(report(num_rows, SHARD))
    ok = set()

    def arrive(fragments: list[tuple[list[int], str]]) -> None:
        for numbers, status in fragments:
            ledger.write_fragment(rows(numbers, SHARD, status=status))
            ok.update(numbers if status == "ok" else [])

    for fragments, (is_driver, death) in zip(arrivals[1:], processes, strict=True):
        arrive(fragments)
        try:
            with dying_at(death, ledger.folder, chance):
                live(ledger, run, is_driver, num_rows)
        except Died:
            pass
    arrive([(list(range(num_rows)), "failed"), *arrivals[0]])
    for is_driver in (False, True):
        live(ledger, run, is_driver, num_rows)
    found = committed_rows(ledger.folder, SHARD)
    assert found["row"].to_pylist() == list(range(num_rows))
    assert {row for row, status in enumerate(found["status"].to_pylist()) if status == "ok"} == ok
    state = ledger.scan()
    assert not state.fragments and not state.shard_reports
