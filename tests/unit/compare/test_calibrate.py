"""`blip2 calibrate` on outputs written without Ray, from rows whose truth is known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from blip2_actor import Calibration, GenerationOptions
from pipeline.cli.main import main
from pipeline.schema import output_schema
from tests.unit.report.finished_output import write_output

SCHEMA = output_schema([pa.field("truth", pa.list_(pa.string())), pa.field("good", pa.bool_())])
OPTIONS = GenerationOptions(num_beams=3, stop=("x",)).resolve()
PARTS = {
    "model": "digest",
    "prompt": "a photo of",
    "columns": {"prompt": None},
    "options": json.loads(json.dumps(dataclasses.asdict(OPTIONS))),
}


def rows_of_a_run(number: int = 400) -> list[dict[str, Any]]:
    """Return rows of which the likely ones are right, and some rows that must not count."""
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for n in range(number):
        logprob = -float(random.exponential(1.0))
        right = random.random() < np.exp(logprob)
        truth = ["something else", "A dog, here."] if right else ["a cat"]
        row = {"caption": "a dog here", "logprob": logprob, "num_tokens": 5, "status": "ok", "flags": []}
        rows.append(row | {"key": f"k{n}", "truth": truth, "good": bool(right)})
    rows.append({"key": "failed", "status": "undecodable", "flags": [], "truth": ["a dog"], "good": False})
    rows.append(rows[0] | {"key": "again", "flags": ["regenerated"]})
    rows.append(rows[0] | {"key": "unknown", "truth": [" "], "good": None})
    return rows


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_output(tmp_path_factory.mktemp("run"), {"0.tar": rows_of_a_run()}, SCHEMA, parts=PARTS).uri


def test_a_calibration_knows_what_it_was_fitted_on(output: str, tmp_path: Path, capsys) -> None:
    file = tmp_path / "c.json"
    assert main(["calibrate", output, "--reference", "truth", "--into", str(file)]) == 0
    found = Calibration.load(file)
    assert found.num_examples == 400
    assert found.fits("digest", "a photo of", OPTIONS)
    assert found.misfit("digest", None, OPTIONS) == "prompt"
    assert found.auroc > 0.6 and found.calibration_error < 0.1
    assert found.probability(-0.01, 5) > 0.7 > 0.4 > found.probability(-3.0, 5)
    said = capsys.readouterr().out
    assert "400 captions with a known truth" in said and "--min-confidence 0.5 keeps" in said


def test_right_and_wrong_may_be_a_column_or_a_file(output: str, tmp_path: Path, capsys) -> None:
    files = [str(tmp_path / name) for name in ("truth.json", "good.json", "judged.json")]
    lines = [f"{row['key']},{str(row['good']).lower()}" for row in rows_of_a_run() if row["good"] is not None]
    judged = tmp_path / "judged.csv"
    judged.write_text("\n".join(["key,right,note", *(f"{line},?" for line in lines), "other,true,"]))
    for arguments, file in zip(
        (["--reference", "truth"], ["--reference", "good"], ["--judged", str(judged)]), files, strict=True
    ):
        assert main(["calibrate", output, *arguments, "--into", file, "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed["coefficients"] == dict(Calibration.load(file).coefficients)
    assert len({Path(file).read_text() for file in files}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--reference must be given, or --judged in its place, got neither"),
        (["--reference", "a", "--judged", "b"], "or --judged in its place, got both"),
        (["--reference", "wrong"], "--reference must be a column of the run, got wrong"),
        (["--judged", ""], "--judged must be a CSV file with the columns key and right"),
        (["--judged", "none.csv"], "--judged must be a CSV file with the columns key and right"),
        (["--reference", "finish_reason"], "needs at least 50 captions with a known truth"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_work(
    output: str, arguments: list[str], message: str, capsys, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["calibrate", output, *arguments])
    except SystemExit as end:
        status = int(end.code or 0)
    assert status == 3 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
