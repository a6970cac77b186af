"""The lines at the end of a run."""

from __future__ import annotations

import dataclasses
import io
import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.caption_counts import CaptionCounts
from pipeline.cli.commands import caption
from pipeline.cli.main import make_parser
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.reconcile import Reconciliation
from pipeline.progress import Console, choose_style
from pipeline.settings.job_settings import CaptionSettings
from pipeline.show import outcome
from pipeline.show.outcome import tell_outcome
from pipeline.storage.folder import Folder
from tests.unit.show.test_show import write_output


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (0.2, "20%"),
        (0.9996, "99.96%"),
        (0.12344, "12.34%"),
        (3e-8, "0.000003%"),
        (0.99999, "99.99%"),
        (1, "100%"),
    ],
)
def test_percentages_have_the_digits_that_matter(fraction, text):
    assert outcome._percent(fraction) == text


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Folder, Reconciliation]:
    """An output of four shards, each with two failed rows of ten."""
    folder = write_output(tmp_path / "my output", num_shards=4)
    ledger = Ledger(folder)
    done = ledger.reconcile(ledger.require_run(), ledger.scan())
    return folder, dataclasses.replace(done, missing=())


def job_of(folder: Folder, allowed_failed: float = 1.0, allowed_flagged: float = 1.0) -> Any:
    settings = SimpleNamespace(max_failed_fraction=allowed_failed, max_flagged_fraction=allowed_flagged)
    return SimpleNamespace(ledger=Ledger(folder), settings=settings)


def outcome_lines(folder: Folder, done: Reconciliation, allowed_failed: float = 1.0) -> list[str]:
    """The lines after the reconciliation."""
    said = io.StringIO()
    tell_outcome(Console(said), job_of(folder, allowed_failed), done)
    return said.getvalue().splitlines()[len(done.lines()) :]


def test_captions_failures_and_commands(finished):
    folder, done = finished
    assert outcome_lines(folder, done) == [
        r"  photo-0-0: a \u001b[2Jcat \u009bon 猫 a mat 0",
        r"  photo-1-0: a \u001b[2Jcat \u009bon 猫 a mat 0",
        r"  photo-2-0: a \u001b[2Jcat \u009bon 猫 a mat 0",
        "  photo-0-4: undecodable: cut at byte 4",
        "  photo-0-9: undecodable: cut at byte 9",
        "  photo-1-4: undecodable: cut at byte 4",
        "  photo-1-9: undecodable: cut at byte 9",
        "  photo-2-4: undecodable: cut at byte 4",
        "  ... and 3 more failed rows",
        f"output: {folder}",
        f"next: blip2 show --output '{folder}' --status not_ok",
        f"      blip2 report --output '{folder}' --html report.html",
        f"      blip2 retry --output '{folder}'",
    ]


@pytest.mark.parametrize(("num_shards", "shown"), [(1, ["0-0", "0-1", "0-2"]), (2, ["0-0", "1-0"])])
def test_a_folder_of_photos_is_one_shard_and_shows_a_few_captions(tmp_path, num_shards, shown):
    folder = write_output(tmp_path, num_shards)
    ledger = Ledger(folder)
    done = ledger.reconcile(ledger.require_run(), ledger.scan())
    lines = outcome_lines(folder, dataclasses.replace(done, missing=()))
    captions = [line for line in lines if "cat" in line]
    assert [line.split(":")[0].removeprefix("  photo-") for line in captions] == shown


def test_the_commands_are_commands(finished):
    folder, done = finished
    for line in outcome_lines(folder, done):
        if "blip2" in line:
            words = shlex.split(line[line.index("blip2") :])
            assert make_parser().parse_args(words[1:]).output == folder.uri


def test_a_command_ends_with_them(finished, monkeypatch, capsys):
    folder, done = finished
    monkeypatch.setattr("pipeline.cli.commands.prepare", lambda settings, engine: job_of(folder))
    monkeypatch.setattr("pipeline.cli.commands.run_job", lambda job, console: done)
    assert caption(CaptionSettings(input=("in",), output=folder.uri)) == 0
    assert capsys.readouterr().out.splitlines()[-13:] == outcome_lines(folder, done)


def test_an_exit_status_is_explained(finished):
    folder, done = finished
    lines = outcome_lines(folder, done, allowed_failed=0.1)
    assert "exit status 2: 20% of the rows failed, more than --max-failed-fraction 0.1 allows" in lines
    cut = dataclasses.replace(done.summaries[0], complete=False, reason="unexpected end of data")
    lines = outcome_lines(folder, dataclasses.replace(done, summaries=(cut, *done.summaries[1:])), 0.0)
    [why] = [line for line in lines if line.startswith("exit status")]
    assert why.endswith("more than --max-failed-fraction 0 allows; a partial shard counts as one failed row")
    lines = outcome_lines(folder, dataclasses.replace(done, missing=("4.tar",)))
    assert "exit status 1: 1 shard of 5 has no file" in lines


@pytest.mark.parametrize(("allowed", "speaks"), [(1.0, False), (0.1, True)])
def test_a_quiet_run_says_something_only_if_it_has_failed(finished, capsys, allowed, speaks):
    folder, done = finished
    choose_style("quiet")
    try:
        tell_outcome(Console(), job_of(folder, allowed), done)
    finally:
        choose_style("text")
    assert bool(capsys.readouterr().out) == speaks


def test_a_program_reads_how_a_run_has_ended(finished, capsys):
    folder, done = finished
    choose_style("json")
    try:
        tell_outcome(Console(), job_of(folder, 0.1), done)
    finally:
        choose_style("text")
    end = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (end["event"], end["exit_status"], end["num_rows"]) == ("end", 2, 40)
    assert end["by_status"] == {"ok": 32, "undecodable": 8} and end["reason"].startswith("20% of the rows")


@pytest.mark.parametrize(("allowed", "status"), [(1.0, 0), (0.5, 2)])
def test_the_share_of_flagged_captions_decides_the_exit_status_of_a_command(finished, allowed, status):
    folder, done = finished
    flagged = CaptionCounts(num_captions=10, num_flagged=6)
    summaries = tuple(dataclasses.replace(summary, captions=flagged) for summary in done.summaries)
    result = dataclasses.replace(done, summaries=summaries)
    assert tell_outcome(Console(), job_of(folder, allowed_flagged=allowed), result) == status


def test_a_run_without_failures_needs_no_retry(finished):
    folder, done = finished
    whole = dataclasses.replace(
        done, summaries=tuple(dataclasses.replace(s, by_status={"ok": 10}) for s in done.summaries)
    )
    assert not any("retry" in line or "not_ok" in line for line in outcome_lines(folder, whole))
    partial = dataclasses.replace(
        whole, summaries=(dataclasses.replace(whole.summaries[0], complete=False), *whole.summaries[1:])
    )
    assert outcome_lines(folder, partial)[-1] == f"      blip2 retry --output '{folder}'"


def test_an_unfinished_run_is_to_be_resumed(finished):
    folder, done = finished
    lines = outcome_lines(folder, dataclasses.replace(done, missing=("4.tar",)))
    assert lines[-1] == "next: run the same command again, which goes on with what is missing"


def test_an_output_that_cannot_be_read_back_raises_nothing(finished):
    """The run is done, and its exit status must say so."""
    folder, done = finished
    (Path(folder.uri) / "0.tar.parquet").write_bytes(b"damaged")
    lines = outcome_lines(folder, done)
    assert lines[0].startswith("the output cannot be read back now") and f"output: {folder}" in lines
