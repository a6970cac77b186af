"""Named outputs through the job on a real Ray: their columns survive fragments, commits, resume and retry."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import pipeline
from blip2_actor import decode_image
from blip2_actor.testing import (
    FakeEngineConfig,
    captions_made,
    fake_caption,
    fake_features,
    fake_score,
)
from pipeline.cli.commands import caption
from pipeline.inputs.reader import ReadOptions
from pipeline.progress import Console
from pipeline.run.prepare import prepare, prepare_retry
from pipeline.run.run_job import run_job
from pipeline.schema import output_schema
from pipeline.settings.fingerprint import FingerprintMismatch
from pipeline.settings.job_settings import CaptionSettings, EmbedSettings, ScoreSettings
from pipeline.settings.outputs import Outputs
from pipeline.settings.retry_settings import RetrySettings
from tests.integration.inputs import BROKEN, SIZE_PX, png, write_tar

pytestmark = pytest.mark.usefixtures("local_ray")
QUESTION = "Question: what color is it? Answer:"
ENGINE = FakeEngineConfig()


def pixels_of(image: bytes) -> np.ndarray:
    return decode_image(image, SIZE_PX).array(SIZE_PX)


def features_of(pixels: np.ndarray) -> dict[str, list]:
    """Return the expected vectors of an image by kind."""
    features = fake_features(pixels)
    assert features.pooler_output is not None and features.qformer_features is not None
    return {
        "vision": features.pooler_output.tolist(),
        "qformer": features.qformer_features.mean(axis=0).tolist(),
        "queries": features.qformer_features.tolist(),
    }


@pytest.fixture
def table(tmp_path) -> list[dict]:
    """Write a table of images with texts, one text missing and one image broken; and an empty table."""
    rows: list[dict] = [{"image": png(n), "alt": f"text {n}", "ask": f"what is {n}?"} for n in range(8)]
    rows[2]["alt"] = None
    rows[5]["image"] = BROKEN
    written = pa.Table.from_pylist(rows)
    (tmp_path / "in").mkdir()
    pq.write_table(written, tmp_path / "in" / "a.parquet")
    pq.write_table(written.slice(0, 0), tmp_path / "in" / "empty.parquet")
    return rows


def settings(tmp_path, ask=QUESTION, **changes) -> CaptionSettings:
    outputs = Outputs.of({"color": ask}, {"v": "queries"}, {"fit": "alt", "sure": "color"})
    return CaptionSettings(
        input=(str(tmp_path / "in"),),
        output=str(tmp_path / "out"),
        reading=ReadOptions(prompt_column="ask", keep=("alt",)),
        outputs=outputs,
        max_failed_fraction=0.5,
        **changes,
    )


def test_a_job_with_everything_at_once(tmp_path, table):
    trace = str(tmp_path / "trace")
    refused = fake_caption(pixels_of(table[3]["image"]), table[3]["ask"])
    assert caption(settings(tmp_path), FakeEngineConfig(trace=trace, refuses_on=(refused,))) == 0
    kept, named = [pa.field("alt", pa.string())], settings(tmp_path).outputs.fields
    with pytest.raises(FingerprintMismatch, match=r"outputs.ask.color: 'Question: .*' -> 'What color\?'"):
        prepare(settings(tmp_path, ask="What color?"), ENGINE)
    assert by_status(tmp_path) == [*["ok"] * 3, "refused", "ok", "undecodable", "ok", "ok"]
    retried = prepare_retry(RetrySettings(output=str(tmp_path / "out")), FakeEngineConfig(trace=trace))
    run_job(retried, Console(io.StringIO()))
    assert pq.read_schema(tmp_path / "out" / "a.parquet.parquet").equals(output_schema(kept, named))
    empty = pq.read_schema(tmp_path / "out" / "empty.parquet.parquet")
    assert empty.names == output_schema(kept, named).names
    rows = pq.read_table(tmp_path / "out" / "a.parquet.parquet").to_pylist()
    for row, given in zip(rows, table, strict=True):
        assert row["alt"] == given["alt"]
        if given["image"] == BROKEN:
            assert {row[name] for name in ("caption", *settings(tmp_path).outputs.names)} == {None}
            continue
        image = pixels_of(given["image"])
        assert row["caption"] == fake_caption(image, given["ask"])
        assert row["color"] == fake_caption(image, QUESTION)
        assert row["v"] == features_of(image)["queries"]
        assert row["fit"] == (given["alt"] and fake_score(image, given["alt"], given["ask"]))
        assert row["sure"] == fake_score(image, row["color"], QUESTION)
    assert len(captions_made(trace)) == 7 * 2 + 2, "only the texts of the retried row are made again"


def by_status(tmp_path) -> list[str]:
    return pq.read_table(tmp_path / "out" / "a.parquet.parquet")["status"].to_pylist()


@pytest.mark.slow
def test_embed_writes_vectors_and_no_text(tmp_path):
    images = {f"{n}": png(n) for n in range(4)} | {"x": BROKEN}
    write_tar(tmp_path / "in" / "a.tar", images)
    trace = str(tmp_path / "trace")
    asked = EmbedSettings(
        input=(str(tmp_path / "in"),),
        output=str(tmp_path / "out"),
        embed=("seen=vision", "mean=qformer"),
        max_failed_fraction=0.5,
    )
    for _ in range(2):
        assert caption(asked, FakeEngineConfig(trace=trace)) == 0
    rows = pq.read_table(tmp_path / "out" / "a.tar.parquet").to_pylist()
    assert set(rows[0]) == {
        *(
            "key",
            "shard",
            "row",
            "member",
            "flags",
            "status",
            "error",
            "width",
            "height",
            "sha256",
            "seen",
            "mean",
        )
    }
    for row, image in zip(rows[:4], images.values(), strict=False):
        assert row["seen"] == features_of(pixels_of(image))["vision"]
        assert row["mean"] == features_of(pixels_of(image))["qformer"]
    assert (rows[4]["status"], rows[4]["seen"]) == ("undecodable", None)
    assert not captions_made(trace)


@pytest.mark.slow
def test_score_writes_the_score_of_each_rows_text(tmp_path, table):
    asked = ScoreSettings(
        input=(str(tmp_path / "in" / "a.parquet"),),
        output=str(tmp_path / "out"),
        text_column="alt",
        reading=ReadOptions(keep=("alt",)),
        max_failed_fraction=0.5,
    )
    assert caption(asked, ENGINE) == 0
    rows = pq.read_table(tmp_path / "out" / "a.parquet.parquet").to_pylist()
    assert "caption" not in rows[0]
    for row, given in zip(rows, table, strict=True):
        right = None
        if given["image"] != BROKEN and given["alt"]:
            right = fake_score(pixels_of(given["image"]), given["alt"])
        assert (row["score"], row["alt"]) == (right, given["alt"])


def test_a_text_column_that_is_not_there_is_refused_before_anything_is_read(tmp_path, table, capsys):
    asked = ScoreSettings(input=(str(tmp_path / "in"),), output=str(tmp_path / "out"), text_column="words")
    assert caption(asked, ENGINE) == 3
    assert "text to score must be one of the columns image, alt, ask, got 'words'" in capsys.readouterr().err


def test_the_stage_on_a_dataset(tmp_path, table):
    ds = ray.data.from_arrow(pa.Table.from_pylist(table))
    made = pipeline.caption(
        ds,
        engine=ENGINE,
        prompt_column="ask",
        asks={"color": QUESTION},
        embeds={"v": "vision"},
        scores={"fit": "alt", "sure": "caption"},
        reuse_identical=True,
    )
    rows = {row["ask"]: row for row in made.take_all()}
    for given in table:
        row = rows[given["ask"]]
        if given["image"] == BROKEN:
            assert (row["status"], row["color"], row["v"]) == ("undecodable", None, None)
            continue
        image = pixels_of(given["image"])
        assert (row["caption"], row["color"]) == (
            fake_caption(image, given["ask"]),
            fake_caption(image, QUESTION),
        )
        assert list(row["v"]) == features_of(image)["vision"]
        assert row["fit"] == (given["alt"] and fake_score(image, given["alt"], given["ask"]))
        assert row["sure"] == fake_score(image, row["caption"], given["ask"])


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"asks": {"alt": "what?"}}, "ask must not name columns that the output has itself, got alt"),
        ({"scores": {"fit": "words"}}, "scores must be one of image, alt, ask, got 'words'"),
    ],
)
def test_names_that_do_not_fit_a_dataset_are_refused(table, named, message):
    with pytest.raises(ValueError, match=message):
        pipeline.caption(ray.data.from_arrow(pa.Table.from_pylist(table)), engine=ENGINE, **named)
