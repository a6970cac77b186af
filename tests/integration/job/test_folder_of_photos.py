"""A folder of a typical user, through the command line: each file is a row or is reported as not read."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from blip2_actor.demo import SceneSampler, draw
from pipeline.cli.main import main
from tests.integration.inputs import read_output

PILLOW_FORMATS = {
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "jpe": "JPEG",
    "jfif": "JPEG",
    "JPG": "JPEG",
    "png": "PNG",
    "webp": "WEBP",
    "bmp": "BMP",
    "gif": "GIF",
    "tiff": "TIFF",
    "tif": "TIFF",
    "avif": "AVIF",
    "heic": "HEIF",
    "heif": "HEIF",
    "jp2": "JPEG2000",
    "": "PNG",
}
"""How to save a picture under each file name ending; "" is a name without one."""
NUM_PICTURES = 33
NO_PICTURES = {
    "notes.txt": b"the pagoda was on the second day",
    "film.mp4": b"\x00\x00\x00\x18ftypmp42" + bytes(64),
    "Thumbs.db": b"\xd0\xcf\x11\xe0" + bytes(64),
    "README": b"no ending, and no picture",
}
NOT_READ = "4 files not read: 1 .db, 1 .mp4, 1 .txt, 1 without ending"
JPEG_XL = b"\x00\x00\x00\x0cJXL \r\n\x87\n" + bytes(64)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


def pictures() -> tuple[dict[str, bytes], dict[str, str]]:
    """Return 33 pictures of every kind by file name, and the captions of 32 of them."""
    pillow_heif.register_heif_opener()
    scenes = SceneSampler("train", 3).sample(NUM_PICTURES - 1)
    files, truth = {"new/scan.jxl": JPEG_XL}, {}
    for number, pixels in enumerate(np.asarray(draw(scenes, 96))):
        ending, pillow_format = [*PILLOW_FORMATS.items()][number % len(PILLOW_FORMATS)]
        name = f"{'é ü' if number % 2 else 'new'}/photo {number}{'.' * bool(ending)}{ending}"
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, pillow_format)
        files[name] = file.getvalue()
        truth[name] = str(scenes.captions[number])
    return files, truth


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def rows_of(output: str) -> dict[str, dict]:
    shards = sorted(path.relative_to(output) for path in Path(output).rglob("*.parquet"))
    rows = [row for shard in shards for row in read_output(output, str(shard.with_suffix("")))]
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: row for row in rows}


def test_rows_and_named_files_are_all_of_37(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, output = str(tmp_path / "my photos"), str(tmp_path / "captions")
    files, truth = pictures()
    write(tmp_path / "my photos", files | NO_PICTURES)
    assert len(files | NO_PICTURES) == 37
    command = ["caption", photos, "-o", output, "-m", "demo", "--max-failed-fraction", "0.05"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert NOT_READ in said
    rows = rows_of(output)
    assert rows.keys() == files.keys() and len(rows) == NUM_PICTURES
    assert [key for key, row in rows.items() if row["status"] != "ok"] == ["new/scan.jxl"]
    assert "JPEG XL" in rows["new/scan.jxl"]["error"] and "new/scan.jxl" in said
    assert sum(rows[key]["caption"] == caption for key, caption in truth.items()) >= 28
    for reads in (["plan", photos, "-m", "demo", "--sample", "2"], ["status", output]):
        assert main(reads) == 0
        assert NOT_READ in capsys.readouterr().out
    assert main(["report", output, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unread"] == [NOT_READ]

    write(tmp_path / "my photos", {"tomorrow.jpg": files["new/photo 0.jpg"]})
    assert main(command) == 0
    said = capsys.readouterr().out
    sentence = "1 new file: tomorrow.jpg; run the first command again with --add-new to take it into the run"
    assert sentence in said
    assert rows_of(output) == rows
    assert main([*command, "--add-new"]) == 0
    grown = rows_of(output)
    assert grown.keys() - rows.keys() == {"tomorrow.jpg"}
    assert grown["tomorrow.jpg"]["caption"] == rows["new/photo 0.jpg"]["caption"]
    assert {key: grown[key] for key in rows} == rows
