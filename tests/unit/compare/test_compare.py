"""`blip2 compare` on outputs that are written without Ray and whose rows are known."""

from __future__ import annotations

import json
import math
import random
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cli.main import main
from pipeline.compare import join as join_module
from pipeline.compare.command import summary_lines
from pipeline.compare.comparison import Comparison, compare
from pipeline.compare.edit_distance import diff, edit_distance
from pipeline.compare.join import Join, Pair
from pipeline.compare.metrics import (
    bleu_statistics,
    cider_scores,
    compare_scores,
    document_frequencies,
    words_of,
)
from pipeline.report.rows import FinishedRows
from pipeline.schema import output_schema
from tests.unit.report import finished_output

SCHEMA = output_schema([pa.field("truth", pa.list_(pa.string()))])

REFERENCES = [
    ["A dog runs on the beach.", "a brown dog running on sand"],
    ["a cat sleeps on a bed"],
    ["two people ride bikes down a street", "people riding bicycles"],
    ["a plate of pizza on a table"],
    ["a red bus drives down the street"],
]
BEFORE = [
    "a dog runs on the beach",
    "a cat lies on a bed",
    "two people ride bikes",
    "a pizza on a table",
    "a bus on the street",
]
AFTER = [
    "a dog on the beach",
    "a cat sleeps on a bed",
    "people ride bikes down a street",
    "a plate of food",
    "a red bus drives down a road",
]


def ok(key: str, caption: str, image: str | None = None, **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"key": key, "status": "ok", "caption": caption, "logprob": -1.0, "flags": []}
    return row | {"sha256": (image or key).encode(), "width": 9, "height": 9} | more


def failed(key: str) -> dict[str, Any]:
    return {"key": key, "status": "undecodable", "error": "cut off", "flags": []}


def write_output(root: Path, shards: dict[str, list[dict[str, Any]]]) -> str:
    return finished_output.write_output(root, shards, SCHEMA).uri


def pairs_of(before: str, after: str) -> tuple[set[tuple[str, str]], Join]:
    join = Join(FinishedRows.find(before), FinishedRows.find(after), 10, [])
    return {(pair.before["caption"], pair.after["caption"]) for pair in join}, join


# The join ---------------------------------------------------------------------------------------------


def test_rows_are_joined_by_key_and_image(tmp_path):
    """This holds across shards with other names and orders; a key alone is not enough."""
    before = write_output(
        tmp_path / "a",
        {"0.tar": [ok("same", "a1"), ok("moved", "a2"), ok("other", "a3", "x")], "1.tar": [ok("gone", "a4")]},
    )
    after = write_output(
        tmp_path / "b",
        {"new.tar": [ok("moved", "b2"), ok("other", "b3", "y"), ok("same", "b1"), ok("add", "b4")]},
    )
    found, join = pairs_of(before, after)
    assert found == {("a1", "b1"), ("a2", "b2")}
    assert join.unmatched == {"other image": 1, "only in A": 1, "only in B": 1}


def test_keys_that_repeat_find_their_own_partner(tmp_path):
    """Every tar of a set may have a 0000.jpg."""
    before = write_output(tmp_path / "a", {f"{n}.tar": [ok("0000", f"a{n}", f"i{n % 2}")] for n in range(4)})
    after = write_output(
        tmp_path / "b", {f"{n}.tar": [ok("0000", f"b{n}", f"i{n % 2}")] for n in reversed(range(4))}
    )
    assert pairs_of(before, after)[0] == {(f"a{n}", f"b{n}") for n in range(4)}


def test_no_row_takes_the_partner_of_a_later_one(tmp_path):
    """A run over two tables without keys used to share no row with a run over the second of them."""
    both = {
        "p1": [ok("0", "a1", "i1"), ok("1", "a2", "i2")],
        "p2": [ok("0", "a3", "i3"), ok("1", "a4", "i4")],
    }
    second = {"p2": [ok("0", "b3", "i3"), ok("1", "b4", "i4")]}
    without = {"p1": [failed("0"), failed("1")], "p2": both["p2"]}
    outputs = {}
    for name, shards in {"both": both, "second": second, "without": without}.items():
        outputs[name] = write_output(tmp_path / name, shards)
    for larger in ("both", "without"):
        found, join = pairs_of(outputs[larger], outputs["second"])
        assert found == {("a3", "b3"), ("a4", "b4")} and join.unmatched == {"only in A": 2}
        found, join = pairs_of(outputs["second"], outputs[larger])
        assert found == {("b3", "a3"), ("b4", "a4")} and join.unmatched == {"only in B": 2}


def test_many_files_with_the_same_keys_are_joined_in_linear_time():
    """Tables without a key column number their rows, so a key is in each file."""
    rows = [{"key": "0", "shard": f"{n}", "sha256": b"%d" % n} for n in range(6_000)]
    start = time.process_time()
    nothing: Any = None  # the outputs are not read
    pairs = list(Join(nothing, nothing, 0, [])._match(rows, list(rows)))
    assert len(pairs) == 6_000 and all(pair.before is pair.after for pair in pairs)
    assert time.process_time() - start < 1  # comparing each row with all others takes 3 s


def test_a_row_without_image_is_joined_by_its_key(tmp_path):
    before = write_output(tmp_path / "a", {"0.tar": [failed("x"), ok("y", "a")]})
    after = write_output(tmp_path / "b", {"0.tar": [ok("x", "b"), failed("y")]})
    found, join = pairs_of(before, after)
    assert found == {(None, "b"), ("a", None)} and not join.unmatched


def test_a_join_in_many_parts_finds_the_same(tmp_path, monkeypatch):
    rows = [ok(f"k{n}", f"c{n}") for n in range(100)]
    before = write_output(tmp_path / "a", {"0.tar": rows[:60], "1.tar": rows[50:90]})
    after = write_output(tmp_path / "b", {"0.tar": rows[::-1]})
    whole, join = pairs_of(before, after)
    monkeypatch.setattr(join_module, "ROWS_AT_ONCE", 1)
    parts, other = pairs_of(before, after)
    assert parts == whole and len(parts) == 90
    assert other.unmatched == join.unmatched == {"only in A": 10, "only in B": 10}


def test_a_join_of_a_billion_rows_opens_no_more_files_than_a_process_may(tmp_path, monkeypatch):
    """Each part used to be an open file: "Too many open files" from a hundred million rows on."""
    found = write_output(tmp_path / "a", {"0.tar": [ok(f"k{n}", "a cat") for n in range(1_500)]})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        side = FinishedRows.find(found)
        assert len(list(Join(side, side, 1_000_000_000, []))) == 1_500
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# What is counted --------------------------------------------------------------------------------------


def test_pairs_are_counted():
    pairs = [
        Pair(ok("a", "a red dog"), ok("a", "a red dog", logprob=-0.5)),
        Pair(ok("b", "a red dog"), ok("b", "a blue dog", logprob=-2.0)),
        Pair(ok("c", "a dog"), ok("c", "a dog on a bed")),
        Pair(ok("d", "a dog"), failed("d") | {"caption": None}),
    ]
    found = compare(pairs)
    assert (found.num_pairs, found.num_captioned, found.num_changed) == (4, 3, 2)
    assert found.distances == {0: 1, 1: 1, 3: 1} and found.mean_distance == pytest.approx(4 / 3)
    assert found.logprobs == {0.5: 1, -1.0: 1, 0.0: 1}
    assert found.mean_logprob_change == pytest.approx(-1 / 6)
    assert found.status_changes == [("ok", "undecodable", 1)]
    assert [change.pair.before["key"] for change in found.largest()] == ["c", "b", "d"]
    said = list(summary_lines(found, {}))
    assert "2 of 3 captions changed (66.67%), 1.33 words per caption on average" in said
    assert "1 row: ok -> undecodable" in said


def test_only_the_largest_changes_are_kept(monkeypatch):
    monkeypatch.setattr("pipeline.compare.comparison.NUM_LARGEST", 5)
    order = list(range(1, 60))
    random.Random(0).shuffle(order)
    found = compare(Pair(ok(str(n), ""), ok(str(n), " ".join("x" * n))) for n in order)
    assert [change.distance for change in found.largest()] == [59, 58, 57, 56, 55]
    shown = [line for line in summary_lines(found, {}) if line.startswith("  ")]
    assert [line.split(":")[0].strip() for line in shown] == ["59", "58", "57"]


def test_two_empty_runs_are_the_same():
    found = Comparison()
    assert (found.changed_fraction, found.mean_distance, found.mean_logprob_change) == (0.0, 0.0, None)
    assert found.scores() == {} and found.largest() == []


def table_distance(before: Sequence[str], after: Sequence[str]) -> int:
    row = list(range(len(after) + 1))
    for number, word in enumerate(before, 1):
        new = [number]
        for at, other in enumerate(after, 1):
            new.append(min(row[at] + 1, new[-1] + 1, row[at - 1] + (word != other)))
        row = new
    return row[-1]


def test_the_edit_distance_is_that_of_the_table():
    chance = random.Random(0)
    for number in range(500):
        before, after = (chance.choices("abcd", k=chance.randrange(90 if number < 9 else 9)) for _ in "AB")
        assert edit_distance(before, after) == table_distance(before, after)


def test_a_diff_marks_what_the_other_text_lacks():
    left, right = diff(["a", "red", "dog", "on", "sand"], ["a", "dog", "on", "wet", "sand"])
    assert left == [("a", False), ("red", True), ("dog on", False), ("sand", False)]
    assert right == [("a", False), ("dog on", False), ("wet", True), ("sand", False)]


# Metrics ----------------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_official_evaluation():
    """The expected values come from the scorers of pycocoevalcap 1.2 on the same words."""
    found = compare_scores(BEFORE, AFTER, REFERENCES)
    assert found["CIDEr"].before == pytest.approx(3.8912167602)
    assert found["CIDEr"].after == pytest.approx(5.3706299719)
    assert found["BLEU-4"].before == pytest.approx(0.5709413850)
    assert found["BLEU-4"].after == pytest.approx(0.6329271419)
    assert (found["exact match"].before, found["exact match"].after) == (0.2, 0.2)


def test_cider_by_hand():
    """Two images, one word each in common with nothing: log 2 in the weights cancels, and what is left is
    the share of the orders for which there are n-grams."""
    references = [[words_of("red dog")], [words_of("blue cat")]]
    frequencies = document_frequencies(references)
    right, half = cider_scores([words_of("red dog"), words_of("blue")], references, frequencies)
    assert right == pytest.approx(10 * (1 + 1 + 0 + 0) / 4)
    # One of two words: cosine 1/sqrt(2) for n = 1, nothing for n = 2; lengths differ by one bigram.
    assert half == pytest.approx(10 / np.sqrt(2) / 4 * np.exp(-1 / 72))


def test_a_short_caption_has_no_long_n_grams():
    [counts] = bleu_statistics([words_of("red dog")], [[words_of("a red dog"), words_of("red sand")]])
    assert counts.tolist() == [2, 1, 0, 0, 2, 1, 0, 0, 2, 2]


def test_the_interval_is_the_same_each_time_and_holds_the_change():
    first, second = (compare_scores(BEFORE, AFTER, REFERENCES)["CIDEr"] for _ in range(2))
    assert first == second and first.low < first.change < first.high
    same = compare_scores(BEFORE, BEFORE, REFERENCES)["BLEU-4"]
    assert (same.change, same.low, same.high) == (0.0, 0.0, 0.0)


# The command ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("outputs")
    hostile = "<script>alert(1)</script>"
    sides = []
    for name, captions in (("a", BEFORE), ("b", AFTER)):
        rows = [ok(f"k{n}", text, truth=REFERENCES[n]) for n, text in enumerate(captions)]
        rows.append(failed("f") if name == "a" else ok("f", hostile))
        sides.append(write_output(root / name, {"0.tar": rows}))
    return sides[0], sides[1]


def test_the_command_prints_json_and_a_page(outputs, tmp_path, capsys):
    html = tmp_path / "compare.html"
    assert main(["compare", *outputs, "--reference", "truth", "--json", "--html", str(html)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["matched"], found["changed"], found["scored"], found["unmatched"]) == (6, 5, 5, {})
    assert found["scores"]["CIDEr"]["after"] == pytest.approx(5.3706299719)
    assert found["status_changes"] == [["undecodable", "ok", 1]]
    assert len(found["largest_changes"]) == 6
    page = html.read_text()
    assert "<mark>sleeps </mark>" in page and "CIDEr" in page and "5.3706" in page
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


def test_the_command_says_what_is_wrong(outputs, tmp_path, capsys):
    before, after = outputs
    for arguments, message in (
        ([before, before], "--after must be another output than the first"),
        ([before, f"{before}/"], "--after must be another output than the first"),
        ([before], "--after must be given"),
        ([before, after, "--reference", "alt"], "--reference must be a column of one of the runs, got alt"),
        ([before, str(tmp_path)], "holds no run"),
    ):
        try:
            status = main(["compare", *arguments])
        except SystemExit as end:
            status = int(end.code or 0)
        assert status == 3 and message in capsys.readouterr().err


def test_an_output_without_rows_is_compared(tmp_path, capsys):
    before, after = (write_output(tmp_path / name, {"0.tar": []}) for name in "ab")
    assert main(["compare", before, after, "--html", str(tmp_path / "c.html")]) == 0
    assert "0 of 0 captions changed" in capsys.readouterr().out
    assert "No caption and no status has changed" in (tmp_path / "c.html").read_text()


def test_runs_over_other_images_are_named(tmp_path, capsys):
    """The output used to be only counts of zero, as for runs without a change."""
    before = write_output(tmp_path / "a", {"0.tar": [ok("a", "a cat")]})
    after = write_output(tmp_path / "b", {"0.tar": [ok("b", "a cat")]})
    assert main(["compare", before, after]) == 0
    assert "no row has a partner: give two runs over the same images" in capsys.readouterr().out


def test_a_run_that_is_not_finished_says_so(tmp_path, capsys):
    """Its unfinished rows used to be "only in B", without a reason."""
    rows = {"0.tar": [ok("a", "a cat")], "1.tar": [ok("b", "a dog")]}
    before, after = (write_output(tmp_path / name, rows) for name in "ab")
    (tmp_path / "a" / "1.tar.parquet").unlink()
    assert main(["compare", before, after, "--json"]) == 0
    said = capsys.readouterr()
    assert said.err == "A: 1 of 2 shards has no file yet; rows of finished shards are compared\n"
    assert json.loads(said.out)["unmatched"] == {"only in B": 1}


def test_plain_files_are_compared_whatever_types_their_writer_has_chosen(tmp_path, capsys):
    """pandas writes a column without values as null, so the second file used not to fit the first one's."""
    numbers: dict[str, Any] = {"shard": "s", "row": 0, "key": "a"}
    rows = [ok("a", "a cat") | numbers | {"error": None}, failed("b") | numbers | {"key": "b"}]
    rows[1] |= {"caption": None, "sha256": None, "width": None, "height": None}
    for name, order in {"before": rows, "after": rows[::-1]}.items():
        (tmp_path / name).mkdir()
        for number, row in enumerate(order):
            own = {"id": "x" if number else 1}  # not compared
            pq.write_table(pa.Table.from_pylist([row | own]), tmp_path / name / f"{number}.parquet")
    command = ["compare", str(tmp_path / "before"), str(tmp_path / "after")]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("2 rows matched by key and image; unmatched: none\n")
    last = tmp_path / "after" / "1.parquet"
    pq.write_table(pa.Table.from_pylist([rows[0] | {"key": None}]), last)
    assert main(command) == 1
    assert "1.parquet" in (said := capsys.readouterr().err) and "a key in every row, got null" in said
    pq.write_table(pa.Table.from_pylist([rows[0] | {"width": math.nan}]), last)
    assert main(command) == 1
    assert "1.parquet" in (said := capsys.readouterr().err) and "must have the types of a run" in said
    pq.write_table(pa.table({"key": ["a"]}), last)
    assert main(command) == 3
    assert "1.parquet has no shard, row" in capsys.readouterr().err
