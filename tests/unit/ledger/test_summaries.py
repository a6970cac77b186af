"""Kept summaries: `status` used to open every finished file's footer, ten minutes for 10^5 shards."""

from __future__ import annotations

import gzip
import json
import os
import shutil

import pytest

from pipeline.inputs.reader import ShardReport
from pipeline.ledger import summaries
from pipeline.ledger.layout import output_name
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.run_record import Run
from pipeline.ledger.summaries import SUMMARIES_PER_FILE
from pipeline.settings.fingerprint import Fingerprint
from pipeline.storage.folder import Folder
from tests.unit.ledger.test_fragments import rows
from tests.unit.ledger.test_ledger import shard

NAMES = ["a.tar", "b.tar", "c.tar"]
RUN = Run(Fingerprint({}), {}, tuple(map(shard, NAMES)))


@pytest.fixture
def ledger(tmp_path):
    return Ledger(Folder(str(tmp_path / "out")))


@pytest.fixture
def opened(monkeypatch):
    """Return the list of shards whose footers are read."""
    seen = []
    original = summaries.read_summary

    def read(folder, name):
        seen.append(name)
        return original(folder, name)

    monkeypatch.setattr(summaries, "read_summary", read)
    return seen


def commit(ledger: Ledger, name: str, numbers=range(3), status="ok"):
    ledger.write_fragment(rows(numbers, shard=name, status=status))
    return ledger.commit(ShardReport(shard=name, num_rows=len(numbers), complete=True), {})


def age(ledger: Ledger, name: str, seconds: float) -> None:
    path = ledger.folder.path(output_name(name))
    written = os.stat(path).st_mtime + seconds
    os.utime(path, (written, written))


def test_kept_summaries_say_what_the_footers_say_and_no_footer_is_opened(ledger, opened):
    committed = [commit(ledger, name) for name in NAMES]
    ledger.keep_summaries(committed)
    done = ledger.reconcile(RUN, ledger.scan())
    assert (opened, done.summaries) == ([], tuple(committed))
    assert (done.num_rows, done.by_status) == (9, {"ok": 9})


@pytest.mark.parametrize("is_slice", [True, False])
def test_a_sweep_keeps_the_summaries_of_what_it_commits(ledger, opened, is_slice):
    """Nobody stores them later for a slice's driver, so each later start used to open these footers again."""
    for name in NAMES:
        ledger.write_fragment(rows(range(3), shard=name))
        ledger.store_shard_report(ShardReport(shard=name, num_rows=3, complete=True))
    state = ledger.sweep(RUN, ledger.scan(), {}, is_slice=is_slice)
    for seen in (state, ledger.scan()):
        assert ledger.reconcile(RUN, seen).num_rows == 9
        assert (opened, len(seen.summaries)) == ([], 1)


def test_a_file_that_was_written_since_is_opened(ledger, opened):
    ledger.keep_summaries([commit(ledger, name) for name in NAMES])
    commit(ledger, "b.tar", range(40))
    age(ledger, "c.tar", seconds=60)  # the same size
    done = ledger.reconcile(RUN, ledger.scan())
    assert (sorted(opened), done.num_rows) == (["b.tar", "c.tar"], 46)


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"no gzip", lambda b: b[:-4] + b"----"]
)
def test_a_damaged_file_of_summaries_is_replaced_by_what_the_footers_say(ledger, opened, damage):
    """A resume relies only on finished files and fragments."""
    ledger.keep_summaries([commit(ledger, name) for name in NAMES])
    (kept,) = ledger.scan().summaries
    ledger.folder.put(kept.name, damage(ledger.folder.get(kept.name)))
    state = ledger.scan()
    done = ledger.reconcile(RUN, state)
    assert (sorted(opened), done.num_rows) == (NAMES, 9)
    ledger.tidy_summaries(state, done)
    opened.clear()
    assert (ledger.reconcile(RUN, ledger.scan()).num_rows, opened) == (9, [])


def test_summaries_of_a_run_are_tidied_into_few_files_that_stay_true(ledger, opened, monkeypatch):
    monkeypatch.setattr(summaries, "MAX_SPARE_FILES", 1)
    for name in NAMES:
        ledger.keep_summaries([commit(ledger, name)])
    for num_files in (1, 1):
        state = ledger.scan()
        ledger.tidy_summaries(state, ledger.reconcile(RUN, state))
        assert len(ledger.scan().summaries) == num_files
    age(ledger, "a.tar", seconds=-1)  # as if an earlier copy was restored
    ledger.reconcile(RUN, ledger.scan())
    assert opened == ["a.tar"]


def test_summaries_are_read_once_and_only_those_that_changed_are_written(ledger, monkeypatch):
    """Each end of a run used to read all summary files twice, and to rewrite all for one shard."""
    ledger.keep_summaries([commit(ledger, name) for name in NAMES])
    age(ledger, "b.tar", seconds=60)
    (before,) = ledger.scan().summaries
    read: list[str] = []
    original = Folder.get

    def get(folder: Folder, name: str) -> bytes | None:
        read.append(name)
        return original(folder, name)

    monkeypatch.setattr(Folder, "get", get)
    state = ledger.scan()
    ledger.tidy_summaries(state, ledger.reconcile(RUN, state))
    assert read == [before.name]
    (new,) = [file.name for file in ledger.scan().summaries if file.name != before.name]
    (kept,) = json.loads(gzip.decompress(ledger.folder.get(new) or b""))
    assert kept["shard"] == "b.tar"


def test_a_thousand_summaries_are_one_file_and_one_more_a_second(ledger):
    summary = commit(ledger, "a.tar")
    ledger.keep_summaries([summary] * (SUMMARIES_PER_FILE + 1))
    assert len(ledger.scan().summaries) == 2


def test_runs_of_before_have_no_kept_summaries_until_a_run_ends(ledger, opened):
    for name in NAMES:
        commit(ledger, name)
    state = ledger.scan()
    ledger.tidy_summaries(state, ledger.reconcile(RUN, state))
    opened.clear()
    ledger.reconcile(RUN, ledger.scan())
    assert opened == []


def test_a_file_under_the_name_of_another_shard_ends_nothing(ledger):
    """`blip2 verify` names it; a resume used to end with KeyError: 'a.tar'."""
    for name in NAMES:
        commit(ledger, name)
    a, b = (ledger.folder.path(output_name(name)) for name in NAMES[:2])
    shutil.copy(b, a)
    assert len(ledger.reconcile(RUN, ledger.scan()).summaries) == len(NAMES)
