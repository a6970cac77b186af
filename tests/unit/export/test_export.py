"""`blip2 export`: other programs read back what it writes, row for row."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_iterator

from pipeline.cli.main import main
from pipeline.export.destination import Destination
from pipeline.export.image_rows import extension_of
from pipeline.export.imagefolder import PART, write_imagefolder
from pipeline.export.webdataset import sample_key
from pipeline.fetching import images_of_rows
from pipeline.fetching.images_of_rows import read_images
from pipeline.inputs.reader import ShardReport, ShardWork
from pipeline.ledger.commit import commit_shard
from pipeline.ledger.fragments import write_fragment
from pipeline.storage.folder import Folder
from tests.integration.inputs import as_table, png, write_tars
from tests.unit.export.finished_run import SCHEMA, write_run

FAILED = (2, 5)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """A run over two tars of seven rows, two of which failed, and its rows."""
    root = tmp_path_factory.mktemp("run")
    write_tars(root / "in", 2, 7)
    return root / "out", write_run(root / "in", root / "out", FAILED)


def export(output: Path, to: str, into: Path) -> int:
    return main(["export", "--output", str(output), "--to", to, "--into", str(into)])


def exported(output: Path, to: str, into: Path) -> Path:
    assert export(output, to, into) == 0
    return into


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return every visible file of an export with its inode and content."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".blip2_export" not in path.parts)
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.read_bytes()) for path in files}


def query(sql: str) -> duckdb.DuckDBPyRelation:
    found = duckdb.sql(sql)
    assert found is not None
    return found


def read_webdataset(*tars: Path) -> list[dict[str, Any]]:
    """Return the samples of tars as the `webdataset` library groups them."""
    samples: list[dict[str, Any]] = []
    for tar in tars:
        with tar.open("rb") as file:
            samples += group_by_keys(dict(member, __url__=str(tar)) for member in tar_file_iterator(file))
    return samples


def hexed(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"sha256": row["sha256"] and row["sha256"].hex()} for row in rows]


def test_json_lines(run, tmp_path):
    output, rows = run
    into = exported(output, "jsonl", tmp_path / "made")
    assert sorted(state_of(into)) == ["part0/00000.tar.jsonl", "part1/00001.tar.jsonl"]
    lines = b"".join(content for _, (_, content) in sorted(state_of(into).items())).splitlines()
    assert [json.loads(line) for line in lines] == hexed(rows)
    found = query(f"select key, caption, vector, error from '{into}/*/*.jsonl' order by shard, row")
    assert found.fetchall() == [(row["key"], row["caption"], row["vector"], row["error"]) for row in rows]


def test_csv(run, tmp_path):
    """Quotes, commas, line ends, null and the empty text survive."""
    output, rows = run
    into = exported(output, "csv", tmp_path / "made")
    options = "all_varchar=true, allow_quoted_nulls=false"
    found = query(f"select * from read_csv('{into}/*/*.csv', {options}) order by shard, row")
    assert found.columns == SCHEMA.names
    made = [dict(zip(found.columns, values, strict=True)) for values in found.fetchall()]
    for row, (there, back) in enumerate(zip(hexed(rows), made, strict=True)):
        for name in ("key", "shard", "member", "caption", "status", "error", "sha256", "color"):
            assert there[name] == back[name], (row, name)
        assert back["vector"] == (there["vector"] and json.dumps(there["vector"]))
        assert int(back["row"]) == there["row"]


@pytest.mark.parametrize("type", [pa.binary(), pa.large_binary(), pa.binary(2)])
def test_bytes_of_any_kind_are_hexadecimal_in_csv(tmp_path, type):
    """Polars writes large binary: its bytes used to be written as text, or the export failed."""
    write_tars(tmp_path / "in", 1, 2)
    write_run(tmp_path / "in", tmp_path / "out")
    (path,) = (tmp_path / "out").rglob("*.parquet")
    pq.write_table(pq.read_table(path).append_column("kept", pa.array([b"\xff\x00", b"ab"], type)), path)
    into = exported(tmp_path / "out", "csv", tmp_path / "made")
    found = query(f"select kept from read_csv('{into}/*/*.csv', all_varchar=true) order by row")
    assert found.fetchall() == [("ff00",), ("6162",)]


def test_text_has_a_line_per_row(run, tmp_path):
    import datasets

    output, rows = run
    into = exported(output, "txt", tmp_path / "made")
    files = [str(into / name) for name in sorted(state_of(into))]
    found = datasets.load_dataset("text", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert found["text"] == [(row["caption"] or "").replace("\n", " ") for row in rows]


def test_a_run_without_captions_is_no_text(tmp_path, capsys):
    """It used to be a KeyError with a traceback, after the folder had been created."""
    write_tars(tmp_path / "in", 1, 2)
    write_run(tmp_path / "in", tmp_path / "out")
    (path,) = (tmp_path / "out").rglob("*.parquet")
    pq.write_table(pq.read_table(path).drop_columns("caption"), path)
    assert export(tmp_path / "out", "txt", tmp_path / "made") == 3
    assert "--to must not be txt for a run without captions, got " in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_an_image_folder_is_read_by_datasets(run, tmp_path):
    import datasets

    output, rows = run
    into = exported(output, "imagefolder", tmp_path / "made")
    found = datasets.load_dataset(
        "imagefolder", data_dir=str(into), split="train", cache_dir=str(tmp_path / "cache")
    ).cast_column("image", datasets.Image(decode=False))
    ok = [row for row in rows if row["status"] == "ok"]
    names = ["key", "shard", "row", "caption", "logprob", "color", "vector"]
    assert [[row[name] for name in names] for row in found] == [[row[name] for name in names] for row in ok]
    images = [Path(row["image"]["path"]).read_bytes() for row in found]
    assert images == [png(int(row["key"][-6:])) for row in ok]


def test_the_output_itself_is_a_dataset(run, tmp_path):
    """The README's line for pushing it to the hub, up to the push."""
    import datasets

    output, rows = run
    files = f"{output}/**/*.parquet"
    found = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
    assert found.to_list() == rows


def test_tars_are_read_by_webdataset(run, tmp_path):
    output, rows = run
    into = exported(output, "webdataset", tmp_path / "made")
    tars = [into / "part0" / "00000.tar", into / "part1" / "00001.tar"]
    assert set(state_of(into)) == {str(tar.relative_to(into)) for tar in tars}
    samples = read_webdataset(*tars)
    ok = [row for row in rows if row["status"] == "ok"]
    assert [sample["__key__"] for sample in samples] == [row["key"] for row in ok]
    assert [sample["txt"].decode() for sample in samples] == [row["caption"] for row in ok]
    assert [json.loads(sample["json"]) for sample in samples] == hexed(ok)
    assert [sample["png"] for sample in samples] == [png(int(row["key"][-6:])) for row in ok]


def test_the_images_of_a_sample_stay_together(tmp_path):
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "a.tar", "w") as tar:
        for seed, name in enumerate(["x/0.left.png", "x/0.right.png", "1.png", "1.png"]):
            member = tarfile.TarInfo(name)
            member.size = len(png(seed))
            tar.addfile(member, io.BytesIO(png(seed)))
    rows = write_run(tmp_path / "in", tmp_path / "out")
    into = exported(tmp_path / "out", "webdataset", tmp_path / "made")
    left_right, first, again = read_webdataset(into / "a.tar")
    assert left_right["__key__"] == "x/0"
    assert (left_right["left.png"], left_right["right.png"]) == (png(0), png(1))
    assert left_right["right.txt"].decode() == rows[1]["caption"]
    assert (first["__key__"], first["png"], again["png"]) == ("1", png(2), png(3))
    assert again["txt"].decode() == rows[3]["caption"]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("cat/1.jpg", "cat/1"),
        ("cat.d/a.b.c.jpg", "cat.d/a_b_c"),
        ("../../etc/passwd", "etc/passwd"),
        ("/etc/x", "etc/x"),
        ("https://a.org/b.png?x=1", "https:/a.org/b_png?x=1"),
        ("__notes__", "_notes_"),
        (".hidden", "_hidden"),
        ("", "7"),
        ("17", "17"),
    ],
)
def test_keys_are_safe_paths_with_one_dot_less(key, expected):
    assert sample_key({"key": key, "row": 7, "member": None}) == expected


@pytest.mark.parametrize(
    ("format", "ending"),
    [
        ("JPEG", "jpg"),
        ("PNG", "png"),
        ("GIF", "gif"),
        ("BMP", "bmp"),
        ("TIFF", "tiff"),
        ("WEBP", "webp"),
        ("AVIF", "avif"),
        ("JPEG2000", "jp2"),
    ],
)
def test_an_image_without_an_ending_gets_that_of_its_content(format, ending):
    """JPEG 2000 used to be exported as .jpg, which few programs open."""
    Image.new("RGB", (64, 64), "red").save(file := io.BytesIO(), format)
    assert extension_of("17", file.getvalue()) == ending


def test_an_image_that_was_decoded_has_an_ending_though_few_others_have_its_first_bytes():
    """A BMP with data in its reserved bytes used to be exported as .jpg."""
    Image.new("RGB", (64, 64), "red").save(file := io.BytesIO(), "BMP")
    odd = file.getvalue()[:6] + b"\1\2\3\4" + file.getvalue()[10:]
    assert Image.open(io.BytesIO(odd)).size == (64, 64)
    assert extension_of("17", odd) == "bmp"
    assert extension_of("17", b"\0\0\0\x18ftypmiaf\0\0\0\0") == "heic"
    assert extension_of("17", b"P6 1 1 255 abc") == "jpg"


def test_no_two_samples_of_a_tar_have_one_key(tmp_path):
    """The number that told a.jpg from a.png used to make it a_1, the key of the next one."""
    (tmp_path / "in").mkdir()
    names = ["a.bmp", "a.jpg", "a.png", "a_1.jpg", "a_1.png", "b.png"]
    for seed, name in enumerate(names):
        (tmp_path / "in" / name).write_bytes(png(seed))
    write_run(tmp_path / "in", tmp_path / "out")
    into = exported(tmp_path / "out", "webdataset", tmp_path / "made")
    (tar,) = state_of(into)
    samples = read_webdataset(into / tar)
    assert [json.loads(sample["json"])["key"] for sample in samples] == names
    assert len({sample["__key__"] for sample in samples}) == len(names)


def test_kept_columns_of_an_image_folder_name_no_files(tmp_path):
    """A kept column file_name used to replace the image's, and `datasets` opened what others name."""
    import datasets

    (tmp_path / "part").mkdir()
    kept = {"file_name": "x.png", "mask_file_name": "y.png", "image": "7", "info": {"file_names": ["z.png"]}}
    row = {"key": "k", "row": 0, **kept, "map": [("file_name", 1.5)]}
    write_imagefolder(tmp_path / "part", "part", [(row, png(1))])  # type: ignore[arg-type]
    (tmp_path / "part" / PART).rename(tmp_path / "metadata.jsonl")
    [row] = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / "cache")
    ).cast_column("image", datasets.Image(decode=False))
    assert Path(row["image"]["path"]).read_bytes() == png(1)
    names = {f"{name}_": value for name, value in kept.items() if name != "info"}
    maps = {"info": {"file_names_": ["z.png"]}, "map": [{"key": "file_name", "value": 1.5}]}
    assert row.items() >= (names | maps).items()


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_images_of_folders_and_tables(tmp_path, monkeypatch, kind):
    images = {f"{seed}.v2.png": png(seed) for seed in range(3)}
    (tmp_path / "in").mkdir()
    if kind == "folder":
        for name, image in images.items():
            (tmp_path / "in" / name).write_bytes(image)
    else:
        pq.write_table(as_table(images), tmp_path / "in" / "table.parquet")
    write_run(tmp_path / "in", tmp_path / "out", failed=(1,))
    asked: list[ShardWork] = []

    def note(work: ShardWork, *others: Any) -> Any:
        asked.append(work)
        return read_images(work, *others)

    monkeypatch.setattr(images_of_rows, "read_images", note)
    into = exported(tmp_path / "out", "webdataset", tmp_path / "made")
    # The images of failed rows used to be fetched again, for a minute each if their server was down.
    assert [work.missing for work in asked] == [((0, 1), (2, 3))]
    (tar,) = state_of(into)
    samples = read_webdataset(into / tar)
    assert [(sample["__key__"], sample["png"]) for sample in samples] == [("0_v2", png(0)), ("2_v2", png(2))]
    assert [json.loads(sample["json"])["key"] for sample in samples] == ["0.v2.png", "2.v2.png"]


@pytest.mark.parametrize("to", ["imagefolder", "webdataset"])
def test_kept_columns_of_view_types(tmp_path, to):
    """Arrow cannot filter them, so the export used to fail halfway."""
    write_tars(tmp_path / "in", 1, 3)
    write_run(tmp_path / "in", tmp_path / "out", failed=(1,))
    (path,) = (tmp_path / "out").rglob("*.parquet")
    kept = pa.array(["a", "b", "c"], pa.string_view())
    pq.write_table(pq.read_table(path).append_column("kept", kept), path)
    into = exported(tmp_path / "out", to, tmp_path / "made")
    if to == "webdataset":
        (tar,) = into.rglob("*.tar")
        made = [json.loads(sample["json"]) for sample in read_webdataset(tar)]
    else:
        made = [json.loads(line) for line in (into / "metadata.jsonl").read_text().splitlines()]
    assert [(row["row"], row["kept"]) for row in made] == [(0, "a"), (2, "c")]


@pytest.mark.parametrize("to", ["jsonl", "imagefolder", "webdataset"])
def test_an_export_goes_on_and_writes_again_what_a_retry_has_changed(tmp_path, capsys, to):
    write_tars(tmp_path / "in", 2, 4)
    rows = write_run(tmp_path / "in", tmp_path / "out", failed=(1,))
    into = exported(tmp_path / "out", to, tmp_path / "made")
    first = state_of(into)
    said = capsys.readouterr().out
    assert said.count(": 4 rows" if to == "jsonl" else ": 3 rows; 1 left out, not ok\n") == 2
    exported(tmp_path / "out", to, into)
    again = state_of(into)
    assert {name: content for name, (_, content) in again.items()} == {n: c for n, (_, c) in first.items()}
    assert {n for n in first if again[n] != first[n]} <= {"metadata.jsonl"}
    assert "2 shards, 2 of them up to date" in capsys.readouterr().out
    folder = Folder(str(tmp_path / "out"))
    fixed = rows[0] | {name: rows[1][name] for name in ("key", "row", "member")}
    fixed |= {"caption": "now it has one", "sha256": sha256(png(1)).digest()}
    write_fragment(folder, pa.Table.from_pylist([fixed], schema=SCHEMA))
    commit_shard(folder, ShardReport(shard=fixed["shard"], num_rows=4, complete=True), {}, SCHEMA)
    exported(tmp_path / "out", to, into)
    assert "2 shards, 1 of them up to date" in capsys.readouterr().out
    assert any(b"now it has one" in content for _, content in state_of(into).values())


@pytest.mark.parametrize("to", ["jsonl", "imagefolder", "webdataset"])
def test_what_was_written_of_a_shard_that_the_run_no_longer_has_is_deleted(tmp_path, to):
    """A table that was divided differently used to leave its old parts in the export next to the new ones."""
    write_tars(tmp_path / "in", 3, 2)
    write_run(tmp_path / "in", tmp_path / "out")
    into = exported(tmp_path / "out", to, tmp_path / "made")
    (into / "part1" / "own.txt").touch()
    for old, new in {"part1/00001": "part1/new", "part0/00002": "part0/00000.tar~0-1"}.items():
        (tmp_path / f"out/{old}.tar.parquet").unlink()
        (tmp_path / f"in/{old}.tar").rename(tmp_path / f"in/{new}.tar")
    write_run(tmp_path / "in", tmp_path / "out")
    exported(tmp_path / "out", to, into)
    fresh = exported(tmp_path / "out", to, tmp_path / "fresh")
    left, wanted = state_of(into), state_of(fresh)
    assert left.pop("part1/own.txt")
    assert {name: content for name, (_, content) in left.items()} == {n: c for n, (_, c) in wanted.items()}


def test_an_export_that_was_killed_as_it_began_goes_on(tmp_path):
    """The next export used to be refused because the folder was not empty."""
    write_tars(tmp_path / "in", 1, 2)
    write_run(tmp_path / "in", tmp_path / "out")
    (tmp_path / "made/.blip2_export").mkdir(parents=True)
    (tmp_path / "made/.blip2_export/run.json.0123").write_text("{")
    assert state_of(exported(tmp_path / "out", "csv", tmp_path / "made"))


def test_what_a_killed_export_had_just_written_is_deleted_with_its_shard(tmp_path, monkeypatch):
    """A file that it had not yet recorded used to be unknown, and stayed for good."""
    write_tars(tmp_path / "in", 2, 2)
    write_run(tmp_path / "in", tmp_path / "out")

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Destination, "finish", die)
        export(tmp_path / "out", "csv", tmp_path / "made")
    assert list(state_of(tmp_path / "made")) == ["part0/00000.tar.csv"]
    (tmp_path / "out/part0/00000.tar.parquet").unlink()
    (tmp_path / "in/part0/00000.tar").rename(tmp_path / "in/part0/new.tar")
    write_run(tmp_path / "in", tmp_path / "out")
    exported(tmp_path / "out", "csv", tmp_path / "made")
    assert sorted(state_of(tmp_path / "made")) == ["part0/new.tar.csv", "part1/00001.tar.csv"]


def test_an_input_folder_may_be_named_as_the_state_of_a_shard(tmp_path):
    """It used to be taken for a shard x that the run no longer has, and the export of x/ was deleted."""
    write_tars(tmp_path / "in", 2, 2)
    for old, new in {"part0": "x", "part1": "x.json"}.items():
        (tmp_path / "in" / old).rename(tmp_path / "in" / new)
    write_run(tmp_path / "in", tmp_path / "out")
    into = exported(tmp_path / "out", "imagefolder", tmp_path / "made")
    before = state_of(into)
    assert {name.split("/")[0] for name in before} >= {"x", "x.json"}
    exported(tmp_path / "out", "imagefolder", into)
    after = state_of(into)
    assert {name: content for name, (_, content) in after.items()} == {n: c for n, (_, c) in before.items()}


@pytest.mark.parametrize("to", ["imagefolder", "webdataset"])
def test_an_image_that_has_changed_is_refused(tmp_path, capsys, to):
    """Its caption must not be exported with another image."""
    write_tars(tmp_path / "in", 2, 3)
    write_run(tmp_path / "in", tmp_path / "out")
    path = tmp_path / "in" / "part1" / "00001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(png(4), png(4)[:-1] + b"x"))
    assert export(tmp_path / "out", to, tmp_path / "made") == 3
    assert (
        "the input must hold the images of the run, got other files: part1/00001.tar"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("to", ["imagefolder", "webdataset"])
def test_an_image_that_has_changed_without_a_trace_is_left_out(tmp_path, capsys, to):
    """Size and time of the tar are the same: only the row's digest tells."""
    write_tars(tmp_path / "in", 2, 3)
    write_run(tmp_path / "in", tmp_path / "out")
    path = tmp_path / "in" / "part1" / "00001.tar"
    written_ns = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes().replace(png(4), png(4)[:-1] + b"x"))
    os.utime(path, ns=(written_ns, written_ns))
    assert export(tmp_path / "out", to, tmp_path / "made") == 2
    said = capsys.readouterr().out
    assert "2 rows; 1 left out, image lost" in said
    assert ": the image is another one than in the run" in said
    assert "exit status 2: 1 row left out without their images" in said


@pytest.mark.parametrize("to", ["imagefolder", "webdataset"])
def test_images_that_vanish_cost_their_rows_and_come_with_the_next_export(tmp_path, capsys, monkeypatch, to):
    """One of them used to end the whole export."""
    write_tars(tmp_path / "in", 2, 3)
    write_run(tmp_path / "in", tmp_path / "out")
    monkeypatch.setattr("pipeline.export.export.require_same_input", lambda *_: None)
    path = tmp_path / "in" / "part0" / "00000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:2500])
    assert export(tmp_path / "out", to, tmp_path / "made") == 2
    said = capsys.readouterr().out
    assert "1 row; 2 left out, image lost" in said and ": 3 rows\n" in said
    assert ": the image can no longer be read: the input ends before it" in said
    path.write_bytes(whole)
    exported(tmp_path / "out", to, tmp_path / "made")
    assert "2 shards, 1 of them up to date" in capsys.readouterr().out
    assert not (tmp_path / "made" / ".blip2_export" / "tmp").exists()


def test_an_image_of_a_folder_that_vanishes_costs_its_row(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for n in range(3):
        (tmp_path / "in" / f"{n}.png").write_bytes(png(n))
    write_run(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "1.png").unlink()
    assert export(tmp_path / "out", "webdataset", tmp_path / "made") == 2
    said = capsys.readouterr().out
    assert "2 rows; 1 left out, image lost" in said
    assert "1.png: the image can no longer be read: the file cannot be read" in said


def test_a_few_of_the_images_that_vanish_are_named(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for n in range(8):
        (tmp_path / "in" / f"{n}.png").write_bytes(png(n))
    write_run(tmp_path / "in", tmp_path / "out")
    for n in range(5):
        (tmp_path / "in" / f"{n}.png").unlink()
    assert export(tmp_path / "out", "webdataset", tmp_path / "five") == 2
    said = capsys.readouterr().out
    assert said.count("can no longer be read") == 5 and " more" not in said
    for n in (5, 6):
        (tmp_path / "in" / f"{n}.png").unlink()
    assert export(tmp_path / "out", "webdataset", tmp_path / "seven") == 2
    said = capsys.readouterr().out
    assert said.count("can no longer be read") == 5 and "  and 2 more\n" in said


def test_other_folders_are_refused(run, tmp_path, capsys):
    output, _ = run
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("mine")
    assert export(output, "csv", tmp_path / "own") == 3
    assert "--into must be a new or empty folder" in capsys.readouterr().err
    exported(output, "csv", tmp_path / "made")
    assert export(output, "jsonl", tmp_path / "made") == 3
    assert "--into must be a new folder, or hold an export of the same run" in capsys.readouterr().err
    assert main(["export", "--output", str(output), "--to", "csv", "--into", "s3://bucket/x"]) == 3
    assert "--into must be a folder on this machine" in capsys.readouterr().err
    assert export(tmp_path / "none", "csv", tmp_path / "new") == 3
    assert export(output, "csv", tmp_path / "own" / "thesis.txt") == 3
    assert "--into must be a folder, got the file" in capsys.readouterr().err
    assert export(output, "csv", output / "_blip2" / "csv") == 3
    assert "--into must not be inside the state of the run" in capsys.readouterr().err
    assert not (output / "_blip2" / "csv").exists()


def test_a_whole_export_needs_no_ray(run, tmp_path):
    output, _ = run
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from pipeline.cli.main import main\n"
        f"sys.exit(main(['export', '--output', {str(output)!r}, '--to', 'webdataset', '--into', "
        f"{str(tmp_path / 'made')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_two_shards_of_one_name_are_refused(run, tmp_path, monkeypatch, capsys):
    """The second one used to replace the first, whose rows were lost. `--format webdataset` reads both."""
    with monkeypatch.context() as patch:
        patch.setattr(Destination, "name_of", lambda self, shard: "one")
        assert export(run[0], "csv", tmp_path / "into") == 3
    assert "would both be one; choose another format" in capsys.readouterr().err
    source: Any = SimpleNamespace(
        run=SimpleNamespace(shards=[SimpleNamespace(name=n) for n in ("a", "a.tar")])
    )
    Destination(tmp_path, "csv", source).require_distinct_names()
    with pytest.raises(ValueError, match=r"a and a\.tar would both be a\.tar; choose another format"):
        Destination(tmp_path, "webdataset", source).require_distinct_names()
