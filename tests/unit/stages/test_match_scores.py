"""Scores by a retrieval checkpoint: beside the captioning engine, or as all that a run makes."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from blip2_actor import EngineConfig, GenerationOptions, MatchingConfig
from blip2_actor.testing import IMAGE_SIZE_PX, random_images, save_tiny_retrieval_checkpoint
from blip2_actor.testing.fake_engine import FakeEngineConfig, fake_caption
from pipeline.settings.outputs import Outputs
from pipeline.settings.settings import CaptionSettings, ScoreSettings
from pipeline.stages.caption import CaptionStage
from pipeline.stages.decode import PIXELS

FAKE = FakeEngineConfig(image_size_px=IMAGE_SIZE_PX)
TEXTS = ["a dog", "two cats on the sofa", None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_retrieval_checkpoint(tmp_path_factory.mktemp("retrieval"))


@pytest.fixture(scope="module")
def config(folder: Path) -> MatchingConfig:
    return MatchingConfig(model=str(folder), device="cpu", dtype="float32", num_threads=1)


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return list(random_images(3).numpy())


def decoded(pictures: list[np.ndarray]) -> pa.Table:
    return pa.table(
        {
            "status": pa.array(["ok"] * len(pictures)),
            "error": pa.nulls(len(pictures), pa.string()),
            "width": pa.array([1] * len(pictures), pa.int32()),
            "height": pa.array([2] * len(pictures), pa.int32()),
            "sha256": pa.array([b"x"] * len(pictures), pa.binary()),
            "alt": pa.array(TEXTS[: len(pictures)], pa.string()),
            PIXELS: pa.array([picture.tobytes() for picture in pictures], pa.binary()),
        }
    )


@pytest.mark.parametrize("kind", ["itm", "itc"])
def test_captions_and_texts_are_matched_in_the_same_run(kind, folder, config, pictures):
    with config.build() as reference:
        captions = [fake_caption(picture) for picture in pictures]
        of_captions = [getattr(m, kind) for m in reference.score(pictures, captions)]
        of_texts = [getattr(m, kind) for m in reference.score(pictures[:2], TEXTS[:2])]  # type: ignore[arg-type]
    outputs = Outputs.of(
        scores={"fit": "caption", "alt_fit": "alt"}, score_model=str(folder), score_kind=kind
    )
    stage = CaptionStage(FAKE, GenerationOptions(), outputs=outputs)
    table = stage(decoded(pictures))
    assert table["caption"].to_pylist() == captions
    assert table["fit"].to_pylist() == pytest.approx(of_captions, abs=1e-5)
    assert table["alt_fit"].to_pylist()[:2] == pytest.approx(of_texts, abs=1e-5)
    assert table["alt_fit"].to_pylist()[2] is None
    assert stage._embeddings_and_scores._matcher.stats().num_images_encoded == 3, "once for both columns"
    assert stage.busy_s > stage.actor.stats().busy_s


def test_a_run_of_scores_alone_loads_the_retrieval_checkpoint_alone(folder, config, pictures):
    asked = ScoreSettings(input=("i",), output="o", text_column="alt", score_model=str(folder))
    builder = asked.job().builder
    assert isinstance(builder, MatchingConfig)
    assert asked.job().fingerprint(builder.info()).parts["model"] == config.info().digest
    stage = CaptionStage(builder, GenerationOptions(), outputs=asked.job().outputs)
    table = stage(decoded(pictures))
    with config.build() as reference:
        right = [match.itm for match in reference.score(pictures[:2], TEXTS[:2])]  # type: ignore[arg-type]
    assert table["score"].to_pylist()[:2] == pytest.approx(right, abs=0.02), "bfloat16 may be the default"
    assert "caption" not in table.column_names
    assert stage.busy_s > 0


def test_the_checkpoint_and_the_kind_are_in_the_fingerprint(folder):
    def fingerprint(**changes):
        outputs = Outputs(score=("fit=caption",), **changes)
        return CaptionSettings(input=("i",), output="o", outputs=outputs).fingerprint(FAKE.info())

    plain, itm = fingerprint(), fingerprint(score_model=str(folder))
    itc = fingerprint(score_model=str(folder), score_kind="itc")
    assert itm.differences(plain) != [] and itc.differences(itm) == ["outputs.score_kind: 'itm' -> 'itc'"]
    assert fingerprint(score_model=str(folder), score_kind="itm") == itm


def test_a_pinned_revision_is_what_is_loaded_and_in_the_fingerprint(folder, monkeypatch):
    """Unpinned, a branch that moves in the middle of a run ends it, and no later run has the same scores."""
    monkeypatch.setattr(
        "blip2_actor.checkpoints.checkpoint.fetch_from_hub",
        lambda name, revision, patterns: (folder, f"commit of {revision}"),
    )
    model = {"score_model": "hub/name", "score_revision": "v2"}
    exclusive = ScoreSettings(input=("i",), output="o", text_column="alt", **model).job()
    beside = CaptionSettings(input=("i",), output="o", outputs=Outputs(score=("fit=caption",), **model))
    assert exclusive.builder.revision == "v2"
    assert exclusive.fingerprint(exclusive.builder.info()).parts["model"] == "commit of v2"
    assert beside.builder.revision is None
    assert beside.fingerprint(FAKE.info()).parts["score_model"] == "commit of v2"


def test_a_checkpoint_for_images_of_another_size_is_refused(folder):
    """Its images would be resized from what was resized already."""
    outputs = Outputs(score=("fit=caption",), score_model=str(folder))
    with pytest.raises(ValueError, match="score_model must take images of 32 px as the model does, got 28"):
        CaptionSettings(input=("i",), output="o", outputs=outputs).fingerprint(FakeEngineConfig().info())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: Outputs(score=("a=caption",), score_kind="itc"),
            "score_kind must be left out",
        ),
        (
            lambda: ScoreSettings(input=("i",), output="o", text_column="t", score_revision="v2").job(),
            "score_revision must be left out without score_model",
        ),
        (lambda: Outputs(score_model="m"), "score_model must be left out without score"),
        (
            lambda: ScoreSettings(input=("i",), output="o", text_column="t", score_model="m", prompt="p"),
            "prompt must be left out with score_model",
        ),
        (
            lambda: ScoreSettings(
                input=("i",), output="o", text_column="t", score_model="m", engine=EngineConfig(model="demo")
            ),
            "model must be left out with score_model",
        ),
        (
            lambda: ScoreSettings(
                input=("i",),
                output="o",
                text_column="t",
                score_model="m",
                engine=EngineConfig(device_map="auto"),
            ),
            "device_map must be left out with score_model",
        ),
        (
            lambda: ScoreSettings(
                input=("i",),
                output="o",
                text_column="t",
                score_model="m",
                engine=EngineConfig(skip_cuda_graphs=True),
            ),
            "skip_cuda_graphs must be left out with score_model",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
