"""`pipeline.caption` on any dataset: its columns stay, and a bad image fails only its own row."""

import doctest
import hashlib
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
from PIL import Image

import pipeline
from blip2_actor import GenerationOptions
from blip2_actor.testing import FakeEngineConfig, fake_caption
from pipeline import Placement
from tests.integration.inputs import SIZE_PX, right_caption

pytestmark = pytest.mark.usefixtures("local_ray")


def png(seed: int, side: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def by_id(ds) -> list[dict]:
    return sorted(ds.take_all(), key=lambda row: row["id"])


def test_every_column_stays_and_the_result_columns_are_added():
    good = [png(seed) for seed in range(6)]
    images = [*good, b"not an image", None]
    columns = {"id": range(8), "label": list("abcdefgh"), "captions": [["mine"]] * 8, "image": images}
    ds = ray.data.from_arrow(pa.table(columns))
    rows = by_id(pipeline.caption(ds, engine=FakeEngineConfig()))
    assert [row["id"] for row in rows] == list(range(8))
    assert set(rows[0]) == {
        *("id", "label", "captions", "image", "caption", "logprob", "num_tokens", "finish_reason", "flags"),
        *("status", "error", "width", "height", "sha256"),
    }
    for row, image in zip(rows[:6], good, strict=True):
        assert row["caption"] == right_caption(image)
        assert (row["status"], row["error"], row["width"], row["height"]) == ("ok", None, 40, 40)
        assert row["sha256"] == hashlib.sha256(image).hexdigest()
        assert row["image"] == image
    assert [row["status"] for row in rows[6:]] == ["undecodable", "missing_image"]
    assert all(row["caption"] is None and row["error"] for row in rows[6:])


def test_the_struct_of_the_datasets_library_is_read(tmp_path):
    (tmp_path / "there.png").write_bytes(png(2))
    images = [
        {"bytes": png(1), "path": "x.png"},
        {"bytes": None, "path": str(tmp_path / "there.png")},
        {"bytes": None, "path": str(tmp_path / "absent.png")},
    ]
    ds = ray.data.from_arrow(pa.table({"id": range(3), "picture": images}))
    rows = by_id(pipeline.caption(ds, engine=FakeEngineConfig(), image_column="picture"))
    assert [row["caption"] for row in rows] == [right_caption(png(1)), right_caption(png(2)), None]


def test_arrays_of_one_size_and_of_several_are_read():
    same = np.random.default_rng(0).integers(0, 256, (3, SIZE_PX, SIZE_PX, 3), np.uint8)
    ds = ray.data.from_numpy(same).map_batches(lambda b: {"id": np.arange(3), "image": b["data"]})
    rows = by_id(pipeline.caption(ds, engine=FakeEngineConfig()))
    assert [row["caption"] for row in rows] == [fake_caption(pixels) for pixels in same]

    several = [np.zeros((20, 30, 3), np.uint8), np.zeros((5, 6, 3), np.uint8)]
    ds = ray.data.from_items([{"id": n, "image": pixels} for n, pixels in enumerate(several)])
    rows = by_id(pipeline.caption(ds, engine=FakeEngineConfig()))
    assert [(row["width"], row["height"], row["status"]) for row in rows] == [(30, 20, "ok"), (6, 5, "ok")]


def test_what_ray_reads_without_a_mode_is_captioned_and_written_as_json(tmp_path):
    """All but one of these used to be undecodable, and the digest could not be written."""
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    (tmp_path / "in").mkdir()
    for mode in ("RGB", "L", "RGBA", "LA"):
        rgb.convert(mode).save(tmp_path / "in" / f"{mode}.png")
    ds = ray.data.read_images(str(tmp_path / "in"), include_paths=True)
    pipeline.caption(ds, FakeEngineConfig()).drop_columns(["image"]).write_json(str(tmp_path / "out"))
    lines = [line for file in (tmp_path / "out").iterdir() for line in file.read_text().splitlines()]
    assert len(lines) == 4
    for row in map(json.loads, lines):
        image = Path(row["path"]).read_bytes()
        assert (row["status"], row["width"], row["height"]) == ("ok", 30, 20)
        assert row["caption"] == right_caption(image), row["path"]
        assert len(bytes.fromhex(row["sha256"])) == 32


def test_a_column_that_holds_no_images_is_refused_before_work():
    ds = ray.data.from_items([{"image": "https://127.0.0.1/a.jpg"}])
    with pytest.raises(
        ValueError, match=r"image_column must hold .*, got 'image' of type string; give fetch"
    ):
        pipeline.caption(ds, FakeEngineConfig())


def test_prompts_from_a_column_and_several_texts():
    prompts = ["Question: what? Answer:", "a photo of"]
    table = pa.table({"id": range(2), "image": [png(1), png(2)], "ask": prompts})
    options = GenerationOptions(num_beams=2, num_return_sequences=2)
    ds = pipeline.caption(
        ray.data.from_arrow(table), engine=FakeEngineConfig(), options=options, prompt_column="ask"
    )
    for row, prompt in zip(by_id(ds), prompts, strict=True):
        best = right_caption(row["image"], prompt)
        assert row["caption"] == best
        assert row["captions"] == [best, f"{best} 1"]
        assert len(row["logprobs"]) == 2


def test_a_column_with_the_name_of_a_result_column_is_refused():
    ds = ray.data.from_arrow(pa.table({"image": [png(1)], "status": ["mine"]}))
    with pytest.raises(ValueError, match="status"):
        pipeline.caption(ds, engine=FakeEngineConfig())


def test_a_missing_image_column_is_refused_by_name():
    ds = ray.data.from_arrow(pa.table({"picture": [png(1)]}))
    with pytest.raises(ValueError, match="image_column must be one of picture, got 'image'"):
        pipeline.caption(ds, engine=FakeEngineConfig())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"ds": [{"image": b""}]},
            "ds must be a ray.data.Dataset, got list; make one with ray.data.from_items",
        ),
        ({"engine": "demo"}, r"engine must be a configuration, such as .* worker builds an engine, got str$"),
        ({"options": {"num_beams": 2}}, "options must be GenerationOptions, got dict"),
        ({"asks": ["color"]}, "asks must be a dictionary of new columns, got list"),
    ],
)
def test_a_wrong_type_is_refused_by_name(change, said):
    """It was an AttributeError of something inside."""
    arguments = {"ds": ray.data.from_items([{"image": png(1)}]), "engine": FakeEngineConfig()} | change
    with pytest.raises(TypeError, match=said):
        pipeline.caption(**arguments)


def test_two_kinds_of_prompt_are_refused():
    ds = ray.data.from_arrow(pa.table({"image": [png(1)], "question": ["what?"]}))
    with pytest.raises(ValueError, match="prompt_column cannot be given together with prompt"):
        pipeline.caption(ds, engine=FakeEngineConfig(), prompt="a photo of", prompt_column="question")


@pytest.mark.slow
def test_the_example_of_the_docstring_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "noise.png").write_bytes(png(0, side=64))
    monkeypatch.chdir(tmp_path)
    examples = doctest.DocTestParser().get_examples(pipeline.caption.__doc__ or "")
    code = "".join(example.source for example in examples)
    exec(compile(code, "pipeline.caption.__doc__", "exec"), {})
    assert "'status': 'ok'" in capsys.readouterr().out


def test_several_calls_run_at_once_in_one_actor(tmp_path):
    """If calls ran one after the other, the engine's slots would be empty between blocks."""
    gate = tmp_path / "gate"
    gate.touch()
    ds = ray.data.from_arrow([pa.table({"id": [n], "image": [png(n)]}) for n in range(6)])
    engine = FakeEngineConfig(opens_gate_at=3, gate=str(gate))
    rows = pipeline.caption(ds, engine=engine, placement=Placement(calls_per_actor=4)).take_all()
    assert len(rows) == 6
    assert not gate.exists()


@pytest.mark.slow
def test_the_pool_grows_while_there_is_work_and_shrinks_when_it_ends(tmp_path):
    """1 -> 2 -> 1 actors: a busy pool takes what the cluster offers; an idle one releases accelerators."""
    gate, trace = tmp_path / "gate", tmp_path / "trace"
    gate.touch()
    ds = ray.data.from_arrow([pa.table({"id": [n], "image": [png(n)]}) for n in range(24)])
    engine = FakeEngineConfig(trace=str(trace), gate=str(gate), holds_on=(right_caption(png(0)),))
    placement = Placement(min_actors=1, max_actors=2, calls_per_actor=2)
    captioned = pipeline.caption(ds, engine=engine, placement=placement)
    with ThreadPoolExecutor(1) as pool:
        rows = pool.submit(captioned.take_all)
        sizes = [1]
        while sizes != [1, 2, 1]:
            assert not rows.done(), rows.result()
            alive = sum(is_alive(int(file.name.partition("-")[0])) for file in trace.glob("*.log"))
            if alive and alive != sizes[-1]:
                sizes.append(alive)
            time.sleep(0.05)
        gate.unlink()
        assert len(rows.result()) == 24


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
