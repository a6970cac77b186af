"""The examples run as their docstrings say, with the demonstration checkpoint on drawn pictures."""

from __future__ import annotations

import ast
import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples import (
    ask_about_folder,
    caption_folder,
    filter_by_match,
    import_files,
    resume_after_a_kill,
    search_by_text,
    stage_in_a_dataset,
    with_datasets,
)
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
    assert caption_folder.main(["--output", "captions"]) == 0, "the same command finds a complete run"


def test_pictures_that_are_there_are_not_written_again(folder):
    """An example that was started again used to find its input changed, and was refused."""
    truth = draw_pictures(folder / "pictures", 3)
    before = {file: file.stat().st_mtime_ns for file in (folder / "pictures").iterdir()}
    assert draw_pictures(folder / "pictures", 3) == truth and len(before) == 3
    assert {file: file.stat().st_mtime_ns for file in (folder / "pictures").iterdir()} == before


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (ask_about_folder.main, ["gone"], "must be a folder of images, got gone"),
        (ask_about_folder.main, ["--ask", "color"], "--ask must be NAME=QUESTION, got color"),
        (filter_by_match.main, ["gone"], "must be a folder of images, got gone"),
        (search_by_text.main, ["a dog", "gone"], "must be a folder of images, got gone"),
    ],
)
def test_a_wrong_argument_is_a_sentence(folder, capsys, main, arguments, said):
    """These mistakes used to cause tracebacks."""
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in capsys.readouterr().err


def test_a_finished_folder_is_not_killed_and_resumed(folder, capsys):
    (folder / "resumed" / "captions").mkdir(parents=True)
    with pytest.raises(SystemExit):
        resume_after_a_kill.main([])
    assert "--folder must hold no captions yet, got resumed" in capsys.readouterr().err


@pytest.mark.slow
def test_the_stage_runs_in_a_dataset(local_ray, capsys):
    assert stage_in_a_dataset.main(["--output", "captioned"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "24 rows written"


def test_pairs_are_filtered_by_their_match(folder, capsys):
    assert filter_by_match.main([]) == 0
    scores = [float(line.split("  ")[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(scores) == 6 and scores == sorted(scores, reverse=True)
    model = filter_by_match.write_demonstration(folder)
    (folder / "pairs" / "no-text.png").write_bytes(b"")
    pairs = filter_by_match.matching_pairs(folder / "pairs", model, scores[2] - 0.0005)
    assert len(pairs) < 6 and all(score >= scores[2] - 0.0005 for _, _, score in pairs)


def test_images_are_searched_by_a_text(folder, capsys):
    assert search_by_text.main(["a blue square"]) == 0
    cosines = [float(line.split("  ")[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(cosines) == 6 and cosines == sorted(cosines, reverse=True)


def test_each_image_of_a_folder_is_asked(folder, capsys):
    truth = draw_pictures(folder / "pictures", 6)
    (folder / "pictures" / "broken.png").write_bytes(b"\x89PNG")
    assert ask_about_folder.main(["pictures"]) == 0
    rows = {row["file"]: row["caption"] for row in csv.DictReader(capsys.readouterr().out.splitlines())}
    assert rows.pop("broken.png").startswith("(the bytes are not a readable")
    # The prompt "a" is the first word of the caption, and the answer is the rest.
    assert sum(truth[name].removeprefix("a").strip() == rest.strip() for name, rest in rows.items()) >= 3
    assert len(rows) == 6


def test_an_output_becomes_import_files(folder, capsys):
    (folder / "captions").mkdir()
    columns = {
        "key": ["a.png", "b.png"],
        "caption": ["a red circle", None],
        "logprob": [-0.5, None],
        "status": ["ok", "undecodable"],
        "error": [None, "not an image"],
    }
    pq.write_table(pa.table(columns), folder / "captions" / "part.parquet")
    assert import_files.main(["captions", "--images", "photos", "--to", "label-studio"]) == 0
    good, bad = json.loads(capsys.readouterr().out)
    assert good["data"] == {"image": "/data/local-files/?d=photos/a.png", "key": "a.png"}
    assert good["predictions"][0]["result"][0]["value"] == {"text": ["a red circle"]}
    assert bad["predictions"] == []
    assert import_files.main(["captions", "--images", "photos", "--to", "fiftyone"]) == 0
    samples = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert samples[0]["filepath"] == str(folder.resolve() / "photos" / "a.png")
    assert samples[1]["tags"] == ["undecodable"]


@pytest.mark.slow
def test_a_data_set_gets_captions(folder, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    assert with_datasets.main(["--output", "captioned.parquet"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "24 rows in captioned.parquet"
    captioned = datasets.load_dataset("parquet", data_files="captioned.parquet", split="train")
    truth = list(draw_pictures(folder / "again", 24).values())
    assert sum(map(str.__eq__, captioned["caption"], truth)) >= 20
    assert captioned[0]["image"].size == (128, 128) and set(captioned["status"]) == {"ok"}


@pytest.mark.slow
def test_the_cells_of_the_notebook_show_their_results(folder):
    """Run each cell as Jupyter does: the value of its last expression is shown."""
    notebook = json.loads((ROOT / "examples" / "notebook.ipynb").read_text())
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "clear the outputs"
    names: dict[str, Any] = {}
    shown = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            *first, last = ast.parse("".join(cell["source"])).body
            exec(compile(ast.Module(first, []), "notebook", "exec"), names)
            if isinstance(last, ast.Expr):
                shown.append(eval(compile(ast.Expression(last.value), "notebook", "eval"), names))
            else:
                exec(compile(ast.Module([last], []), "notebook", "exec"), names)
    sheet, texts, table, closed = shown
    assert repr(sheet) == "ResultSheet(13 results, 12 ok)" and sheet._repr_html_().count("<img ") == 12
    assert len(texts) == 3 and all(texts)
    assert "undecodable" in names["table"]["status"].tolist() and hasattr(table, "_repr_html_")
    assert closed is None


def test_every_example_is_run_by_a_test():
    examples = {file.stem for file in (ROOT / "examples").glob("*.py")} - {"__init__", "drawn_pictures"}
    tested = (
        Path(__file__).read_text() + (ROOT / "tests/chaos/own_clusters/test_example_resumes.py").read_text()
    )
    assert all(f"{example}." in tested for example in examples), examples
