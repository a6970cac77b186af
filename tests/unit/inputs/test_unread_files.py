"""What a run has written is never its input, and files that are not read are counted and reported."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from blip2_actor.testing import FakeEngineConfig
from pipeline.errors import InputError
from pipeline.inputs import file_kinds, image_kinds
from pipeline.inputs.file_kinds import Unread
from pipeline.inputs.globs import Patterns
from pipeline.inputs.listing import list_input, list_shards
from pipeline.plan import stage_costs
from pipeline.plan.make_plan import make_plan
from pipeline.report.status import RunStatus
from pipeline.settings.fingerprint import FingerprintMismatch
from pipeline.settings.plan_settings import PlanSettings
from tests.unit.inputs.formats.reading_cases import encoded
from tests.unit.inputs.run_without_ray import captions, prepare_run, run


def write_table(path: Path, *keys: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"key": list(keys), "image": [key.encode() for key in keys]}), path)


def test_an_output_inside_the_input_is_left_out_of_the_next_run(tmp_path):
    """The second run used to caption the first one's captions, or was refused for lack of an image column."""
    write_table(tmp_path / "in/a.parquet", "a0", "a1")
    run(tmp_path, output=str(tmp_path / "in/captions"))
    (tmp_path / "in/captions/_blip2/run.json").unlink()  # files of the output may be copied without its state
    for name in (tmp_path / "in", tmp_path / "in/**/*.parquet"):
        listing = list_input(str(name))
        assert [shard.name for shard in listing.shards] == ["a.parquet"]
        assert listing.unread.lines() == ["left out: 1 file of an earlier run"]
    run(tmp_path, prompt="a photo of")
    assert list(captions(tmp_path)) == ["a.parquet"]


def test_captions_next_to_photos_do_not_make_the_folder_one_of_two_kinds(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(b"a")
    run(tmp_path, output=str(tmp_path / "in/captions"))
    again = run(tmp_path, output=str(tmp_path / "in/captions"))
    assert (again.num_rows, again.exit_status(0.0)) == (1, 0)
    left_out = ("left out: 1 file of an earlier run",)
    assert prepare_run(tmp_path).notes == left_out
    # A resume and --format open no table, and used to report it as a file that is not read.
    assert prepare_run(tmp_path, output=str(tmp_path / "in/captions")).notes == left_out
    assert prepare_run(tmp_path, format="folder").notes == left_out


def test_a_table_in_a_folder_whose_name_is_not_utf8_refuses_nothing(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    folder = tmp_path / "\udcff"
    folder.mkdir()
    (folder / "x.parquet").write_bytes(b"PAR1")
    assert list_input(str(tmp_path), format="folder").unread == Unread({".parquet": 1})


def test_an_output_is_read_if_its_files_are_named_one_by_one(tmp_path):
    """A second step may score the columns that a first one has kept."""
    write_table(tmp_path / "in/a.parquet", "a0", "a1")
    run(tmp_path)
    with pytest.raises(
        InputError, match=r"but the output of an earlier run \(1 files\); name another input, or name"
    ):
        list_shards(str(tmp_path / "out"))
    assert len(list_shards([str(tmp_path / "out/a.parquet.parquet")])) == 1


@pytest.mark.parametrize("named", ["in", "in/a.parquet", "in/*.parquet"])
def test_an_output_that_is_the_folder_of_the_input_is_refused(tmp_path, named):
    write_table(tmp_path / "in/a.parquet", "a0")
    with pytest.raises(ValueError, match="output must be another folder than that of the input, got /"):
        prepare_run(tmp_path, input=(str(tmp_path / named),), output=f"{tmp_path}/in/")
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["a.parquet"]


def test_a_sixth_ending_is_named(tmp_path):
    """It used to be reported as `1 others`, which takes as much room as its name."""
    for name in ["a.jpg", "a.aae", "a.db", "a.dng", "a.mov", "a.pdf", "a.svg"]:
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    said = "6 files not read: 1 .aae, 1 .db, 1 .dng, 1 .mov, 1 .pdf, 1 .svg"
    assert prepare_run(tmp_path).notes == (said,)


def test_files_that_are_not_read_are_counted_by_ending(tmp_path):
    names = ["a.jpg", "b.JPG", "c.mp4", "d.MP4", "e.txt", "f.pdf", "g.svg", "h.psd", "i.cr2", "README"]
    ignored = ["Thumbs/@eaDir/a.jpg", "__MACOSX/a.jpg", ".DS_Store", "._a.jpg"]
    for name in [*names, *ignored]:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    said = "8 files not read: 2 .mp4, 1 .cr2, 1 .pdf, 1 .psd, 1 .svg, 2 others"
    assert prepare_run(tmp_path).notes == (said,)
    result = run(tmp_path)
    assert result.num_rows == 2
    record = json.loads((tmp_path / "out/_blip2/run.json").read_text())
    assert record["unread"]["by_ending"] == {
        ".mp4": 2, ".txt": 1, ".pdf": 1, ".svg": 1, ".psd": 1, ".cr2": 1, "without ending": 1
    }  # fmt: skip
    assert said in RunStatus.read(str(tmp_path / "out")).lines()
    assert prepare_run(tmp_path).notes == (said,)
    assert Unread().lines() == []


def test_patterns_choose_the_files_of_an_input_and_are_kept_by_the_run(tmp_path):
    for name in ("0.jpg", "0_mask.png", "masks/1.jpg", "a/masks/2.jpg", "3.jpg", "notes.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(name.encode())
    patterns: dict[str, Any] = {"exclude": ("*_mask.png", "**/masks/**")}
    run(tmp_path, **patterns)
    assert [key for key, _ in captions(tmp_path)["in~0-1"]] == ["0.jpg", "3.jpg"]
    (tmp_path / "in/4_mask.png").write_bytes(b"x")
    notes = ("1 file not read: 1 .txt", "left out: 4 files by --include and --exclude")
    assert prepare_run(tmp_path, **patterns).notes == notes
    with pytest.raises(FingerprintMismatch, match=r"exclude: \['\*_mask.png', '\*\*/masks/\*\*'\] -> "):
        prepare_run(tmp_path)
    jpg = list_shards(str(tmp_path / "in"), patterns=Patterns(include=("*.jpg",), exclude=("a/**",)))
    assert jpg[0].files == ("0.jpg", "3.jpg", "masks/1.jpg")
    with pytest.raises(InputError, match="holds no file that --include and --exclude take"):
        list_shards(str(tmp_path / "in"), patterns=Patterns(include=("*.tar",)))


def test_a_plan_says_what_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(stage_costs, "MIN_S", 0.01)
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    (tmp_path / "b.mp4").write_bytes(b"x")
    found = make_plan(PlanSettings(input=(str(tmp_path),), sample=1), FakeEngineConfig())
    assert "          1 file not read: 1 .mp4" in list(found.lines())
    assert found.to_dict()["unread"] == {"by_ending": {".mp4": 1}, "num_own": 0, "num_excluded": 0}


def test_images_that_nothing_here_decodes_are_named_before_the_work(tmp_path, monkeypatch):
    """Each used to be a failed row, the first five of which were shown hours later."""
    (tmp_path / "in").mkdir()
    for name in ("a.HEIC", "b.heif", "c.jxl", "heic", "d.jpg"):
        (tmp_path / "in" / name).write_bytes(b"\xff\xd8\xff")
    jpeg_xl = "1 image is JPEG XL, which is not supported; convert it"
    assert prepare_run(tmp_path).notes == (jpeg_xl,)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    heic = "2 images are HEIC, which needs pillow-heif; run: pip install 'blip2-ray[heic]'"
    assert prepare_run(tmp_path).notes == (heic, jpeg_xl)


def test_images_without_an_ending_are_recognized_by_their_content(tmp_path):
    """Downloads are often named by a digest: a folder of them used to be refused, or to lose them."""
    for format in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "AVIF", "JPEG2000"):
        (tmp_path / format).write_bytes(encoded(format))
    (tmp_path / "notes").write_text("BM is not always a bitmap")
    (tmp_path / "\udcff").write_bytes(encoded("PNG"))  # Arrow opens such a name only if encoded
    listing = list_input(str(tmp_path))
    names = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP", "\udcff")
    assert listing.shards[0].files == names
    assert listing.unread == Unread({"without ending": 1})


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (OSError("AWS Error SLOW_DOWN"), pytest.raises(InputError, match="0 cannot be read, whose name")),
        (pa.ArrowException("Unknown error: Authentication"), pytest.raises(InputError, match="0 cannot be")),
        (PermissionError("AWS Error ACCESS_DENIED"), nullcontext()),
        (pa.ArrowInvalid("Empty path component"), nullcontext()),
    ],
)
def test_an_image_without_an_ending_is_not_left_out_because_a_store_fails(
    tmp_path, monkeypatch, error, outcome
):
    """It used to count as a file that is not read, and the run ended as if it had all images."""

    def fail(filesystem: pafs.FileSystem, path: str) -> None:
        raise error

    store = MemoryFileSystem()
    store.pipe_file(f"{tmp_path}/0", encoded("PNG"))
    store.pipe_file(f"{tmp_path}/1.png", encoded("PNG"))
    monkeypatch.setattr(image_kinds, "open_input", fail)
    with outcome:
        assert list_input(f"memory://{tmp_path}").unread == Unread({"without ending": 1})


def test_a_resume_and_status_open_no_file_that_the_run_knows(tmp_path, monkeypatch):
    """Each start and each status used to read the first bytes of every image without an ending."""
    (tmp_path / "in").mkdir()
    for name in ("0", "1"):
        (tmp_path / "in" / name).write_bytes(encoded("PNG"))
    run(tmp_path)
    opened: list[str] = []

    def head(filesystem: object, path: str) -> bytes:
        opened.append(path)
        return b""

    monkeypatch.setattr(file_kinds, "head_of", head)
    (tmp_path / "in/2").write_bytes(b"x")
    assert prepare_run(tmp_path).notes == ("1 file not read: 1 without ending",)
    assert "1 file not read: 1 without ending" in RunStatus.read(str(tmp_path / "out")).lines()
    assert opened == [str(tmp_path / "in/2")] * 2


def test_every_picture_of_a_phone_or_a_browser_is_a_row(tmp_path):
    endings = ["jfif", "jpe", "avif", "heic", "HEIF", "jp2", "jxl"]
    for at, ending in enumerate(endings):
        (tmp_path / f"{at}.{ending}").write_bytes(b"x")
    assert list_shards(str(tmp_path))[0].num_rows == len(endings)
