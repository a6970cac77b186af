"""A store that fails in the middle of a commit: whichever request fails, the file comes out the same."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from itertools import count

import pytest

from pipeline.inputs.reader import ShardReport
from pipeline.ledger.ledger import Ledger
from pipeline.schema import ROW_CONTRACT
from pipeline.storage import folder as folder_module
from pipeline.storage import retrying
from pipeline.storage.folder import Folder
from tests.unit.ledger.test_fragments import committed_rows
from tests.unit.storage.test_retrying import Clock

REQUESTS = ("_put_once", "_get_once", "_list_once", "_delete_once")
REPORT = ShardReport(shard="a.tar", num_rows=20, complete=True)
CAPTIONS = [f"c{n}" for n in range(20)]


def fill(ledger: Ledger) -> None:
    for start in (0, 5, 15, 10):
        rows = [
            {"key": f"{n}", "shard": "a.tar", "row": n, "flags": [], "status": "ok", "caption": f"c{n}"}
            for n in range(start, start + 5)
        ]
        ledger.write_fragment(ROW_CONTRACT.empty_table().from_pylist(rows, schema=ROW_CONTRACT))
    ledger.store_shard_report(REPORT)


@pytest.mark.parametrize("is_late", [False, True], ids=["refused", "carried out and not told"])
def test_a_commit_succeeds_whichever_request_fails(tmp_path, monkeypatch, is_late):
    """Without retries one 503 would make a committing actor end the job."""
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 0.0)
    made: list[str] = []
    numbers = count()
    failing = 0

    def flaky(request: str) -> Callable:
        original = getattr(Folder, request)

        def call(*args, **kwargs):
            made.append(request)
            fails = next(numbers) == failing
            if fails and not is_late:
                raise OSError("503 slow down")
            result = original(*args, **kwargs)
            if fails:
                raise OSError("500 after the request was carried out")
            return result

        return call

    def commit(ledger: Ledger) -> None:
        nonlocal numbers
        fill(ledger)
        made.clear()
        numbers = count(1)
        with monkeypatch.context() as patched:
            for request in REQUESTS:
                patched.setattr(Folder, request, flaky(request))
            summary = ledger.commit(REPORT, {})
        assert summary is not None and summary.by_status == {"ok": 20}
        assert committed_rows(ledger.folder, "a.tar")["caption"].to_pylist() == CAPTIONS
        state = ledger.scan()
        assert (state.finished, dict(state.fragments), state.shard_reports) == ({"a.tar"}, {}, {})
        assert not os.path.exists(ledger.folder.path("_blip2/fragments/a.tar.rows"))

    commit(Ledger(Folder(str(tmp_path / "undisturbed"))).with_retries())
    assert set(made) == set(REQUESTS)
    for failing in range(1, len(made) + 1):
        commit(Ledger(Folder(str(tmp_path / f"{failing}"))).with_retries())


@pytest.mark.parametrize("full", ["rollover", "write"])
def test_a_commit_outlasts_a_full_disk_on_which_it_prepares_the_file(tmp_path, monkeypatch, full):
    """A file of more than 64 MiB went to the disk outside any retry, and its error ended the job at once."""
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(folder_module, "SPOOL_BYTES", 1000)
    left = iter(range(3))
    original = getattr(tempfile.SpooledTemporaryFile, full)

    def call(*args):
        if next(left, None) is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args)

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, full, call)
    ledger = Ledger(Folder(str(tmp_path)).with_retries())
    fill(ledger)
    summary = ledger.commit(REPORT, {})
    assert summary is not None and summary.captions.num_captions == 20
    assert next(left, None) is None
    assert committed_rows(ledger.folder, "a.tar")["caption"].to_pylist() == CAPTIONS
    assert ledger.scan().leftovers == ()


def test_a_full_temporary_folder_is_not_taken_for_a_full_store():
    """It was waited for, as "output has been full", for 15 minutes."""
    num_tries = 0

    def write(file):
        nonlocal num_tries
        num_tries += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        Folder("memory://full").with_retries().put_made("x", write)
    assert num_tries == 1


def fail(monkeypatch: pytest.MonkeyPatch, request: str, times: int) -> list[float]:
    """Let a request of folders fail several times; return the pauses that the retries make."""
    pauses: list[float] = []
    clock = Clock()
    original, left = getattr(Folder, request), iter(range(times))

    def call(*args):
        if next(left, None) is not None:
            raise OSError("503 slow down")
        return original(*args)

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        clock.sleep(seconds)

    def retry(action, retry_for_s, **options):
        return retrying.retry_on_oserror(action, retry_for_s, sleep=sleep, clock=lambda: clock.now, **options)

    monkeypatch.setattr(Folder, request, call)
    monkeypatch.setattr("pipeline.storage.folder.retry_on_oserror", retry)
    return pauses


CALLS: dict[str, tuple[str, Callable[[Folder], object]]] = {
    "put": ("_put_once", lambda folder: folder.put("x", b"1")),
    "get": ("_get_once", lambda folder: folder.get("x")),
    "names": ("_list_once", lambda folder: folder.names()),
    "delete": ("_delete_once", lambda folder: folder.delete("x")),
    "erase": ("_erase_once", lambda folder: folder.erase()),
    "put_made": ("_put_once", lambda folder: folder.put_made("x", lambda file: file.write(b"1"))),
    "read": ("open", lambda folder: folder.read("x", lambda file: file.read())),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_folder_with_retries_repeats_every_request_and_a_new_one_none(tmp_path, monkeypatch, name):
    """`status` must answer at once, and a run must outlast a store that fails for a minute."""
    request, call = CALLS[name]
    folder = Folder(str(tmp_path))
    folder.put("x", b"0")
    pauses = fail(monkeypatch, request, times=3)
    with pytest.raises(OSError, match="503"):
        call(folder)
    assert pauses == []
    call(folder.with_retries(60.0))
    assert pauses == [0.5, 1.0]


def test_a_probe_is_not_repeated_even_in_a_folder_with_retries(tmp_path, monkeypatch):
    """A command with a mistake in --output must be refused at once and not after a quarter of an hour."""
    pauses = fail(monkeypatch, "_put_once", times=1)
    with pytest.raises(ValueError, match="output must be a folder that can be written"):
        Folder(str(tmp_path)).with_retries().require_writable()
    assert pauses == []


def test_a_folder_below_keeps_the_retries_and_shares_nothing_else(tmp_path):
    folder = Folder(str(tmp_path)).with_retries(5.0)
    assert folder.below("a").retry_for_s == 5.0
    assert folder.with_retries(0.0) == Folder(str(tmp_path))
