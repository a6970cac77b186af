"""A store that fails in the middle of a commit: whatever step it hits, the file comes out the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import count

import pytest

from pipeline.inputs.reader import ShardReport
from pipeline.ledger.commit import commit_shard, read_rows
from pipeline.ledger.fragments import write_fragment
from pipeline.ledger.ledger import StoreShardReport, scan_output
from pipeline.schema import ROW_CONTRACT
from pipeline.storage import retrying as patience
from pipeline.storage.folder import Folder

METHODS = ("put", "get", "names", "delete")
REPORT = ShardReport(shard="a.tar", num_rows=20, complete=True)


def fill(folder: Folder) -> None:
    for start in (0, 5, 15, 10):
        rows = [
            {"key": f"{n}", "shard": "a.tar", "row": n, "flags": [], "status": "ok", "caption": f"c{n}"}
            for n in range(start, start + 5)
        ]
        write_fragment(folder, ROW_CONTRACT.empty_table().from_pylist(rows, schema=ROW_CONTRACT))
    StoreShardReport(folder)(REPORT)


@pytest.mark.parametrize("is_late", [False, True], ids=["refused", "carried out and not told"])
def test_a_commit_goes_on_whatever_request_fails(tmp_path, monkeypatch, is_late):
    """Without patience a committing actor would end the job at one 503."""
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.0)
    made: list[str] = []
    numbers = count()
    failing = 0

    def flaky(method: str) -> Callable:
        original = getattr(Folder, method)

        def call(*args, **kwargs):
            made.append(method)
            fails = next(numbers) == failing
            if fails and not is_late:
                raise OSError("503 slow down")
            result = original(*args, **kwargs)
            if fails:
                raise OSError("500 after the request was carried out")
            return result

        return call

    def commit(folder: Folder) -> None:
        nonlocal numbers
        fill(folder)
        made.clear()
        numbers = count(1)
        with monkeypatch.context() as patched:
            for method in METHODS:
                patched.setattr(Folder, method, flaky(method))
            summary = commit_shard(folder, REPORT, {})
        assert summary is not None and summary.by_status == {"ok": 20}
        rows = read_rows(folder, "a.tar")
        assert rows is not None and rows["caption"].to_pylist() == [f"c{n}" for n in range(20)]
        state = scan_output(folder)
        assert (state.finished, dict(state.fragments), state.shard_reports) == ({"a.tar"}, {}, frozenset())
        assert not os.path.exists(folder.path("_blip2/fragments/a.tar.rows"))

    commit(Folder(str(tmp_path / "undisturbed")))
    assert set(made) == set(METHODS)
    for failing in range(1, len(made) + 1):
        commit(Folder(str(tmp_path / f"{failing}")))


def test_a_spell_without_end_is_given_up(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("503 slow down")

    clock = iter(range(0, 10_000, 400))
    with pytest.raises(OSError, match="503"):
        patience.retry_on_oserror(fails, sleep=lambda _: None, clock=lambda: next(clock))
