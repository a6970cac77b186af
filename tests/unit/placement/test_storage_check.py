"""Paths that nodes do not share: all captions used to be lost, or empty shards counted as finished."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pipeline.inputs.listing import list_input
from pipeline.inputs.shards import Shard
from pipeline.placement.storage_check import SUBMITTED, look_at_storage
from pipeline.run.prepare import prepare
from pipeline.settings.job_settings import CaptionSettings
from pipeline.storage.folder import Folder
from tests.integration.inputs import write_tars


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    write_tars(tmp_path / "in", num_tars=2, rows_per_tar=1)
    return list(list_input([str(tmp_path / "in")]).shards)


def test_a_node_that_shares_both_is_fine(tmp_path: Path, shards: list[Shard]) -> None:
    folder = Folder(str(tmp_path / "out"))
    folder.put("proof", b"")
    report = look_at_storage(folder, "proof", shards)
    assert (report.output, report.input) == (None, None)


def test_a_private_output_is_noticed_and_not_written(tmp_path: Path, shards: list[Shard]) -> None:
    report = look_at_storage(Folder(str(tmp_path / "out")), "proof", shards)
    assert report.output == "the driver's files are not there"
    assert not (tmp_path / "out").exists()


def test_an_input_is_missed_only_if_no_file_opens(tmp_path: Path, shards: list[Shard]) -> None:
    folder = Folder(str(tmp_path / "out"))
    folder.put("proof", b"")
    gone = [dataclasses.replace(shard, root=str(tmp_path / "gone")) for shard in shards]
    reason = look_at_storage(folder, "proof", gone).input
    assert reason is not None and "gone" in reason
    assert look_at_storage(folder, "proof", [gone[0], shards[1]]).input is None
    assert look_at_storage(folder, "proof", []).input is None, "a node that does not read"


@pytest.mark.parametrize("field", ["input", "output"])
def test_a_relative_path_in_a_submitted_job_is_refused(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job used to "succeed", with the only copy of its output in Ray's package cache on the head."""
    places = {"input": (str(tmp_path / "in"),), "output": str(tmp_path / "out")}
    places[field] = ("in",) if field == "input" else "out"
    monkeypatch.setenv(SUBMITTED, "{}")
    with pytest.raises(ValueError, match=f"{field} must be a URI or an absolute path in a submitted job"):
        prepare(CaptionSettings(**places))  # type: ignore[arg-type]
