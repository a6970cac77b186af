"""The examples run as their docstrings say, with the demonstration checkpoint on drawn pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import caption_folder, filter_by_match, stage_in_a_dataset
from examples.drawn_pictures import draw_pictures

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_folder_of_pictures_is_captioned(local_ray, folder, capsys):
    assert caption_folder.main(["--output", "captions"]) == 0
    shown = [line.split("  ") for line in capsys.readouterr().out.splitlines() if line.startswith("scene-")]
    truth = draw_pictures(folder / "again", 24)
    assert len(shown) == 10
    assert sum(truth[Path(key).name] == caption for key, caption in shown) >= 8


@pytest.mark.slow
def test_the_stage_runs_in_a_dataset(local_ray, capsys):
    assert stage_in_a_dataset.main(["--output", "captioned"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "24 rows written"


def test_pairs_are_filtered_by_their_match(folder, capsys):
    assert filter_by_match.main([]) == 0
    scores = [float(line.split("  ")[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(scores) == 6 and scores == sorted(scores, reverse=True)
    model = filter_by_match.write_demonstration(folder)
    pairs = filter_by_match.matching_pairs(folder / "pairs", model, scores[2] - 0.0005)
    assert len(pairs) < 6 and all(score >= scores[2] - 0.0005 for _, _, score in pairs)


def test_every_example_is_run_by_a_test():
    examples = {file.stem for file in (ROOT / "examples").glob("*.py")} - {"__init__", "drawn_pictures"}
    tested = (
        Path(__file__).read_text() + (ROOT / "tests/chaos/own_clusters/test_example_resumes.py").read_text()
    )
    assert all(f"{example}." in tested for example in examples), examples
