"""`blip2 report` on outputs that are written without Ray and whose rows are known."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard

from blip2_actor import DecodePool, EngineConfig, Status
from pipeline.attempts.attempt import Attempt
from pipeline.attempts.store import write_attempt
from pipeline.cli.main import main
from pipeline.demo.dataset import MARKER
from pipeline.inputs.listing import list_shards
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.run_record import Run
from pipeline.report.card import dataset_card
from pipeline.report.models import DEMO_WARNING, license_of
from pipeline.report.pace import UNKNOWN
from pipeline.report.page import render_page
from pipeline.report.remedies import REMEDIES, remedy
from pipeline.report.report import make_report
from pipeline.report.statistics import FrequentTexts, Statistics
from pipeline.schema import output_schema
from pipeline.settings.fingerprint import Fingerprint
from pipeline.settings.job_settings import CaptionSettings
from pipeline.settings.outputs import Outputs
from pipeline.storage.folder import Folder
from tests.integration.inputs import BROKEN, SIZE_PX, write_tars
from tests.unit.report.finished_output import write_shard

HOSTILE = "<script>alert('x')</script><img src=x onerror=\"alert('y')\">"


def write_run(root: Path, num_tars: int = 2, rows_per_tar: int = 30, **changes: Any) -> Folder:
    """Write a finished run over real tars.

    Every tenth image is broken, every seventh caption is flagged, and captions repeat.
    """
    truth = write_tars(root / "in", num_tars, rows_per_tar, broken_every=10)
    settings = CaptionSettings(input=(str(root / "in"),), output=str(root / "out"), prompt=HOSTILE, **changes)
    folder = Folder(settings.output)
    Ledger(folder).begin(Run(Fingerprint({}), settings.to_dict(), tuple(list_shards(settings.input))))
    schema = output_schema(
        [
            pa.field("url", pa.string()),
            pa.field("vector", pa.list_(pa.float32())),
            pa.field("color", pa.string()),
            pa.field("fit", pa.float32()),
        ]
    )
    for shard, images in truth.items():
        rows: list[dict[str, Any]] = []
        for at, (key, image) in enumerate(images.items()):
            row: dict[str, Any] = {"key": f"{key}{HOSTILE}", "shard": shard, "row": at}
            row |= {"flags": [], "url": HOSTILE}
            if image == BROKEN:
                row |= {
                    "status": "undecodable",
                    "error": f"JPEG 2000, status 404, cut at byte {at} {HOSTILE}",
                }
            else:
                row |= {"status": "ok", "caption": f"{HOSTILE} {at % 3}", "num_tokens": at % 3 + 4}
                row |= {"width": 24, "height": 20, "sha256": hashlib.sha256(image).digest()}
                row |= {"flags": ["looping"] if at % 7 == 0 else [], "vector": [1.0, 2.0]}
                row |= {
                    "logprob": -at / 10,
                    "color": "blue" if at % 3 else "red",
                    "fit": -0.25 if at % 3 else -0.5,
                }
            rows.append(row)
        write_shard(folder, shard, pa.Table.from_pylist(rows, schema=schema))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Folder:
    return write_run(tmp_path_factory.mktemp("run"))


class Page(HTMLParser):
    """Collects the tags and the text of a page, as a browser parses them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


def test_statistics_agree_with_the_reconciliation(folder):
    found = make_report(folder.uri)
    statistics, done = found.statistics, found.reconciliation
    assert (statistics.num_rows, statistics.by_status) == (done.num_rows, done.by_status)
    assert statistics.by_status == {"ok": 54, "undecodable": 6}
    assert statistics.num_tokens == {4: 18, 5: 18, 6: 18}
    assert sorted(statistics.captions.top(9)) == [(f"{HOSTILE} {n}", 18) for n in range(3)]
    assert statistics.long_side_px == {32: 54}
    assert statistics.flags["looping"].count == 10
    # The errors differ only in the number of the byte, so they are one reason; the others are names.
    ((status, reason),) = statistics.reasons
    assert (status, reason) == ("undecodable", f"JPEG 2000, status 404, cut at byte N {HOSTILE}")
    assert statistics.reasons[status, reason].count == 6
    assert len(found.samples) == 60 and not found.thumbnails


def test_hostile_texts_are_escaped(folder):
    """Captions come from untrusted images, and keys from untrusted file names."""
    page = render_page(make_report(folder.uri, 8))
    found = Page(page)
    assert not found.open
    assert {tag for tag, _ in found.tags}.isdisjoint({"link", "iframe", "object"})
    assert [tag for tag, _ in found.tags].count("script") == 1  # the page's own
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    images = [attributes for tag, attributes in found.tags if tag == "img"]
    assert images and all((image["src"] or "").startswith("data:image/jpeg;base64,") for image in images)
    assert all(image["alt"] == "" for image in images)  # the button around it names the row
    assert HOSTILE in found.text and "url: <script>" in found.text and "2 values" in found.text
    policy = next(a["content"] for tag, a in found.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'") and "unsafe" not in policy
    for tag in ("style", "script"):
        content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not any("style" in attributes for _, attributes in found.tags)


def test_a_row_has_a_thumbnail_only_if_its_image_is_unchanged(tmp_path):
    """The input may have changed since the run: the page must show only images that were captioned."""
    folder = write_run(tmp_path, num_tars=1, rows_per_tar=12)
    found = make_report(folder.uri, 24)
    assert {row for _, row in found.thumbnails} == {row for row in range(12) if row != 9}
    with DecodePool(SIZE_PX) as pool:
        (decoded,) = pool.decode([found.thumbnails["part0/00000.tar", 3]])
    assert (decoded.width, decoded.height) == (256, 213)
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=11, broken_every=2)
    assert {row for _, row in make_report(folder.uri, 24).thumbnails} == {0, 2, 4, 6, 8, 10}
    (tmp_path / "in" / "part0" / "00000.tar").unlink()
    assert make_report(folder.uri, 24).thumbnails == {}


def test_an_error_of_decoding_thumbnails_is_not_one_of_the_input(tmp_path, monkeypatch):
    """The page used to lack the thumbnails silently."""

    def fail(*_: Any) -> Any:
        raise OSError("no processes are left")

    folder = write_run(tmp_path, num_tars=1, rows_per_tar=4)
    monkeypatch.setattr(DecodePool, "decode", fail)
    with pytest.raises(OSError, match="no processes are left"):
        make_report(folder.uri, 4)


def test_the_command_prints_the_summary_and_writes_the_page(folder, tmp_path, capsys):
    html = tmp_path / "report.html"
    assert main(["report", "--output", folder.uri, "--html", str(html)]) == 0
    said = capsys.readouterr().out
    assert all(line in said for line in make_report(folder.uri).lines())
    assert "60 rows = 54 ok + 6 failed" in said and "10 flagged looping" in said
    assert html.read_text().startswith("<!DOCTYPE html>")
    assert main(["report", "--output", str(tmp_path)]) == 3
    assert "holds no run; pass the folder given as --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "name", "rule"),
    [
        (
            "html",
            "missing/report.html",
            "a file in a folder of this machine, got .*make the folder .*missing",
        ),
        ("card", ".", "a file, got the folder .*name a file in it"),
        ("card", "", "the name of a file, got an empty one"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_work(folder, tmp_path, capsys, flag, name, rule):
    """All shards and pictures used to be read before `[Errno 2] No such file or directory`."""
    assert main(["report", folder.uri, f"--{flag}", name and str(tmp_path / name)]) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(f"blip2: --{flag} must be {rule}.*\n", said.err)


def test_the_page_and_the_card_are_two_files(folder, tmp_path, capsys):
    """The card used to replace the page."""
    assert main(["report", folder.uri, "--html", "a.md", "--card", "a.md"]) == 3
    assert "--card must be another file than --html, got a.md twice" in capsys.readouterr().err


def test_a_bar_finds_the_rows_that_it_counts(folder):
    """Bars end at 100 on both sides, and rows beyond used to be in none of them."""
    found = make_report(folder.uri)
    far = dataclasses.replace(found.samples[0], row={**found.samples[0].row, "logprob": -123.45, "fit": 1e9})
    outputs = Outputs(score=("fit=caption",), score_model="me/itm")
    settings = CaptionSettings(input=("i",), output="o", outputs=outputs).to_dict()
    run = dataclasses.replace(found.run, settings=settings)
    page = render_page(dataclasses.replace(found, samples=[far], run=run))
    assert 'data-likely="-100.0"' in page and 'data-score0="100.0"' in page


def test_the_page_says_that_pictures_are_lacking_only_if_some_were_asked_for(folder):
    found = make_report(folder.uri)
    assert "No picture" not in render_page(found)
    assert "No picture" in render_page(dataclasses.replace(found, max_thumbnails=9))


def test_a_home_folder_of_nobody_is_a_folder_that_is_missing(folder, capsys):
    assert main(["report", folder.uri, "--html", "~nobody-has-this-name/report.html"]) == 3
    assert "--html must be a file in a folder of this machine" in capsys.readouterr().err


def test_memory_does_not_grow_with_the_number_of_texts():
    frequent = FrequentTexts(max_texts=100)
    for at in range(5_000):
        frequent.add([(f"rare {at}", 1), ("common", 1)])
    assert len(frequent) <= 201 and not frequent.is_exact
    assert frequent.top(5) == [("common", 5_000)]


def test_an_output_without_captions_or_rows_is_counted():
    """`embed` writes no captions, and a shard may be empty."""
    schema = output_schema(captioned=False)
    statistics = Statistics()
    statistics.add(schema.empty_table())
    row: dict[str, Any] = {"key": "a", "shard": "s", "row": 0, "flags": [], "status": "ok"}
    row |= {"width": 1, "height": 1}
    statistics.add(pa.Table.from_pylist([row], schema=schema))
    assert (statistics.num_rows, statistics.num_tokens, statistics.long_side_px) == (1, {}, {1: 1})


def test_times_of_files_decide_nothing(tmp_path):
    """A copied output, whose files all have the same second, once reported 277,777 rows/s."""
    folder = write_run(tmp_path, num_tars=1)
    assert UNKNOWN in list(make_report(folder.uri).lines())


def test_the_page_names_the_models_that_were_loaded(folder):
    """A run that computes only scores loads no language model: the page must not name the default one."""
    found = make_report(folder.uri)
    scores_only = Outputs(caption=False, score=("fit=alt",), score_model="me/itm")
    with_captions = Outputs(score=("fit=caption",), score_model="me/itm")
    pages = []
    for outputs in (scores_only, with_captions):
        settings = CaptionSettings(input=("i",), output="o", outputs=outputs).to_dict()
        run = dataclasses.replace(found.run, settings=settings)
        pages.append(render_page(dataclasses.replace(found, run=run)))
    assert "<p>me/itm <" in pages[0] and "opt-2.7b" not in pages[0]
    assert "<p>me/itm <" in pages[1] and "opt-2.7b" in pages[1] and "non-commercial" in pages[1]


def test_json_and_card_say_what_the_page_says(folder, tmp_path, capsys):
    page, card = tmp_path / "page.html", tmp_path / "README.md"
    flags = ["--json", "--card", str(card), "--html", str(page), "--thumbnails", "5"]
    assert main(["report", "--output", folder.uri, *flags]) == 0
    out, said = capsys.readouterr()
    assert f"page: {page}, with 5 thumbnails read from the input\ncard: {card}\n" in said
    found = json.loads(out)
    assert (found["rows"], found["by_status"]) == (60, {"ok": 54, "undecodable": 6})
    assert found["rows_per_s"] is None and found["active_s"] is None
    assert found["histograms"]["num_tokens"] == [[4, 18], [5, 18], [6, 18]]
    assert sum(n for _, n in found["histograms"]["logprob"]) == 54
    assert found["failures"][0]["rows"] == 6 and len(found["samples"]) == 60
    read = DatasetCard.load(card)
    assert read.data.size_categories == ["n<1K"] and "60 rows" in read.text
    assert "<script>" not in read.text and "&#60;script&#62;" in read.text
    assert "Most frequent captions" in read.text
    without = dataclasses.replace(make_report(folder.uri), statistics=Statistics())
    assert "Most frequent captions" not in dataset_card(without)


def test_named_outputs_are_counted(tmp_path):
    outputs = Outputs(ask=("color=Color?",), score=("fit=caption",), embed=("vector=vision",))
    folder = write_run(tmp_path, num_tars=1, outputs=outputs)
    found = make_report(folder.uri)
    assert dict(found.statistics.answers["color"].top(9)) == {"blue": 18, "red": 9}
    assert found.statistics.scores["fit"] == {-0.5: 9, -0.25: 18}
    assert found.norms["vector"] == {2.24: 27}
    page = render_page(found)
    assert "Answers: color" in page and "Score fit" in page and "Norm of vector, of 27 sampled rows" in page


def test_vectors_are_counted_and_not_kept(tmp_path, monkeypatch):
    """426 rows with the vectors of 32 queries used to take 1.6 GB and to become 175 MB of JSON."""
    folder = write_run(tmp_path, num_tars=2, outputs=Outputs(embed=("vector=vision",)))
    found = make_report(folder.uri)
    assert found.norms["vector"] == {2.24: 54} and len(found.samples) == 60
    assert all("vector" not in sample.row and "color" in sample.row for sample in found.samples)
    monkeypatch.setattr("pipeline.report.report.MAX_NORMS", 9)
    read_row_group, has_vectors = pq.ParquetFile.read_row_group, list[bool]()

    def read(file: pq.ParquetFile, group: int, columns: list[str]) -> pa.Table:
        has_vectors.append("vector" in columns)
        return read_row_group(file, group, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read)
    found = make_report(folder.uri)
    assert sum(found.norms["vector"].values()) == 9
    assert has_vectors.count(True) == 1, "the second file is read without its vectors"
    assert all("vector" not in sample.row for sample in found.samples)


def test_the_demo_model_warns_of_images_that_are_not_its_own(tmp_path):
    folder = write_run(tmp_path, num_tars=1, engine=EngineConfig(model="demo"))
    found = make_report(folder.uri)
    assert next(found.lines()) == DEMO_WARNING and "drawn scenes" in render_page(found)
    (tmp_path / "in" / MARKER).touch()
    assert not any("demo" in warning for warning in make_report(folder.uri).warnings)


def test_every_status_that_is_not_ok_has_a_remedy():
    assert set(REMEDIES) == set(Status) - {Status.OK}
    assert remedy("undecodable").startswith("The file") and remedy("of a newer version") == ""


def test_a_command_in_an_error_stays_one_that_can_be_pasted_and_is_the_remedy():
    """It used to be `pip install 'blipN-ray[heic]'`, next to the advice that the file is damaged."""
    statistics = Statistics()
    error = "the image is HEIC, which needs pillow-heif; run: pip install 'blip2-ray[heic]'"
    row = {"key": "a", "status": "undecodable", "error": error, "flags": []}
    statistics.add(pa.Table.from_pylist([row], schema=output_schema()))
    ((status, reason), _) = statistics.most_frequent_reasons()[0]
    assert reason == error and remedy(status, reason) == "Run the command that the error names, then retry."


def test_the_page_tells_of_the_last_start_that_had_a_worker(tmp_path):
    """After a start with nothing to do, the page used to show no phases and no hardware."""
    folder = write_run(tmp_path, num_tars=1)
    worked: dict[str, Any] = {"phases": {"start Ray": 1.5}, "hardware": {"cpus": 96.0}, "ready_s": 3.0}
    for minute, values in enumerate((worked, {})):
        begun = f"2026-01-31T18:0{minute}:00+00:00"
        write_attempt(folder, Attempt(id=f"{minute}", run="r", begun=begun, **values))
    page = render_page(make_report(folder.uri))
    assert "start Ray" in page and "96.0" in page


def test_a_page_takes_names_that_are_not_utf8(tmp_path):
    folder = write_run(tmp_path, num_tars=1, rows_per_tar=1)
    begun = "2026-01-31T18:00:00+00:00"
    write_attempt(folder, Attempt(id="0", run="r", begun=begun, exit_status=1, reason="lost: \udcff.png"))
    files = ["--html", str(tmp_path / "r.html"), "--card", str(tmp_path / "r.md")]
    assert main(["report", "--output", folder.uri, *files]) == 0
    assert r"lost: \udcff.png" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_the_license_of_another_model_is_not_that_of_the_demonstration():
    assert license_of("demo") == "Apache-2.0"
    assert license_of("demo-team/captioner").startswith("license unknown")


@pytest.mark.parametrize("num_rows", [0, 1])
def test_small_outputs_have_a_page(tmp_path, num_rows):
    found = make_report(write_run(tmp_path, num_tars=1, rows_per_tar=num_rows).uri, 9)
    assert len(found.samples) == num_rows and "Contact sheet" in render_page(found)
