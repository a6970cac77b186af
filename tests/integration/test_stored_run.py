"""This version resumes, retries and reports a run that an earlier version began.

`tests/fixtures/stored_run` was written by version 0.1.0, before the packages were divided into folders: three
tars of drawn scenes, a half-done run (one shard written, four rows of the next in fragments) and the same run
after it finished.
"""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.cli.main import main
from pipeline.schema import plain_type

STORED = Path(__file__).parents[1] / "fixtures" / "stored_run"
FLAGS = (
    "--input input --output output --model demo --device cpu --dtype float32 --keep txt "
    "--embed vector=qformer --max-failed-fraction 0.1 --image-cpu-s 30"
)
COMMAND = ["caption", *FLAGS.split(), "--ask", "colour=what colour?"]


def unpack(folder: Path, run: str) -> Path:
    """Copy the input and one of the stored outputs to the folder to which the recorded paths then lead."""
    shutil.copytree(STORED / "input", folder / "input")
    shutil.copytree(STORED / run, folder / "output")
    shards = folder / "output" / "_blip2" / "shards.jsonl.gz"
    moved = gzip.decompress(shards.read_bytes()).replace(b"/before/input", str(folder / "input").encode())
    shards.write_bytes(gzip.compress(moved))
    return folder / "output"


@pytest.mark.usefixtures("local_ray")
def test_a_run_begun_before_resumes_with_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = unpack(tmp_path, "half_done")
    monkeypatch.chdir(tmp_path)
    written_before = (output / "scenes-0.tar.parquet").read_bytes()
    assert main(COMMAND) == 0, capsys.readouterr()
    assert (output / "scenes-0.tar.parquet").read_bytes() == written_before
    for expected in sorted((STORED / "finished").glob("*.parquet")):
        found, wanted = pq.read_table(output / expected.name), pq.read_table(expected)
        # Vectors were fixed-size lists, and the file that was written before still has these.
        kinds = [{f.name: plain_type(f.type) for f in table.schema} for table in (found, wanted)]
        assert kinds[0] == kinds[1] and found.column_names == wanted.column_names
        assert found.drop(["logprob", "vector"]).equals(wanted.drop(["logprob", "vector"]))
        fingerprints = [
            pq.read_metadata(path).metadata[b"blip2.fingerprint"]
            for path in (output / expected.name, expected)
        ]
        assert fingerprints[0] == fingerprints[1]


@pytest.mark.usefixtures("local_ray")
@pytest.mark.slow
def test_a_run_finished_before_is_retried_with_its_own_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unpack(tmp_path, "finished")
    monkeypatch.chdir(tmp_path)
    assert main(["retry", "--output", "output", "--max-failed-fraction", "0.1"]) == 0, capsys.readouterr()
    assert "18 rows = 17 ok + 1 failed" in capsys.readouterr().out


def test_another_prompt_is_still_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unpack(tmp_path, "half_done")
    monkeypatch.chdir(tmp_path)
    assert main([*COMMAND[:-1], "colour=which colour?"]) != 0
    assert "outputs.ask.colour: 'what colour?' -> 'which colour?'" in capsys.readouterr().err


def test_status_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unpack(tmp_path, "half_done")
    monkeypatch.chdir(tmp_path)
    assert main(["status", "--output", "output"]) == 0
    assert "6 rows = 6 ok + 0 failed" in capsys.readouterr().out
