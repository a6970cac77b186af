"""A broken checkpoint gives every image the same caption or none, which must not look like a success."""

from __future__ import annotations

import pytest

from pipeline.caption_counts import CaptionCounts
from pipeline.inputs.reader import ShardReport
from pipeline.inputs.shards import Shard
from pipeline.ledger.commit import CAPTIONS_KEY, commit_shard, read_summary
from pipeline.ledger.fragments import write_fragment
from pipeline.ledger.reconcile import Reconciliation, reconcile
from pipeline.ledger.scan import scan_output
from pipeline.schema import ROW_CONTRACT
from pipeline.storage.folder import Folder


def reconciled(folder: Folder, captions: list[str | None], flags: list[list[str]]) -> Reconciliation:
    """Commit rows in two shards, and reconcile."""
    shards = []
    for name, part in (("a.tar", slice(0, None, 2)), ("b.tar", slice(1, None, 2))):
        rows = [
            {
                "key": str(n),
                "shard": name,
                "row": n,
                "caption": text,
                "flags": of_row,
                "status": "ok" if text is not None else "undecodable",
            }
            for n, (text, of_row) in enumerate(zip(captions[part], flags[part], strict=True))
        ]
        write_fragment(folder, ROW_CONTRACT.empty_table().from_pylist(rows, schema=ROW_CONTRACT))
        commit_shard(folder, ShardReport(shard=name, num_rows=len(rows), complete=True), {})
        shards.append(Shard(name=name, format="webdataset", root="/in", files=(name,)))
    return reconcile(folder, shards, scan_output(folder))


@pytest.mark.parametrize(
    ("captions", "flags", "fraction", "warning"),
    [
        ([f"caption {n}" for n in range(40)], [[]] * 40, 0.0, None),
        ([""] * 40, [["empty"]] * 40, 1.0, "40 of 40 captions are flagged (100.0%)"),
        (["a cat"] * 40, [[]] * 40, 1.0, "40 of 40 captions are the same ('a cat')"),
        (["a cat " * 20] * 40, [[]] * 40, 1.0, "a cat a cat…')"),
        (["a cat"] * 30 + [f"{n}" for n in range(10)], [[]] * 40, 0.75, "30 of 40 captions are the same"),
        (["a cat"] * 10, [[]] * 10, 0.0, None),  # ten pictures of one cat
        (
            [f"{n}" for n in range(40)],
            [["looping"], *[[]] * 39],
            0.025,
            "1 of 40 captions are flagged (2.5%)",
        ),
        ([f"{n}" for n in range(40)], [["regenerated", "truncated"]] * 40, 0.0, None),
        ([None] * 40, [[]] * 40, 0.0, None),
    ],
)
def test_captions_that_are_worth_nothing_are_counted(tmp_path, captions, flags, fraction, warning):
    result = reconciled(Folder(str(tmp_path)), captions, flags)
    assert result.captions.flagged_fraction == fraction
    assert result.exit_status(1.0) == 0, "by default flags do not count"
    assert result.exit_status(1.0, fraction) == 0
    if fraction:
        assert result.exit_status(1.0, fraction - 0.01) == 2
    said = [line for line in result.lines() if line.startswith("warning: ")]
    assert [warning in line for line in said] == ([] if warning is None else [True] * len(said))
    assert bool(said) == (warning is not None)


def test_a_file_of_an_earlier_version_has_no_counts(tmp_path, monkeypatch):
    folder = Folder(str(tmp_path))
    monkeypatch.setattr("pipeline.ledger.commit.CAPTIONS_KEY", b"another key")
    reconciled(folder, ["a"] * 4, [[]] * 4)
    monkeypatch.setattr("pipeline.ledger.commit.CAPTIONS_KEY", CAPTIONS_KEY)
    assert read_summary(folder, "a.tar").captions == CaptionCounts()
