"""Scores from a retrieval checkpoint: next to the captioning engine, or as a run's only output."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from blip2_actor import EngineConfig, Match, MatchingConfig
from blip2_actor.testing import (
    IMAGE_SIZE_PX,
    FakeEngineConfig,
    fake_caption,
    random_images,
    save_tiny_retrieval_checkpoint,
)
from pipeline.settings.caption_spec import CaptionSpec
from pipeline.settings.job_settings import CaptionSettings, ScoreSettings
from pipeline.settings.outputs import Outputs, ScoreKind
from pipeline.stages.caption import CaptionStage
from tests.unit.stages.decoded_tables import decoded

FAKE = FakeEngineConfig(image_size_px=IMAGE_SIZE_PX)
TEXTS = ["a dog", "two cats on the sofa"]
"""The third picture has none."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_retrieval_checkpoint(tmp_path_factory.mktemp("retrieval"))


@pytest.fixture(scope="module")
def config(folder: Path) -> MatchingConfig:
    return MatchingConfig(model=str(folder), device="cpu", dtype="float32", num_threads=1)


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return list(random_images(3).numpy())


def with_texts(pictures: list[np.ndarray]) -> pa.Table:
    return decoded(pictures, alt=pa.array([*TEXTS, None], pa.string()))


def of_kind(match: Match, kind: ScoreKind) -> float | None:
    return match.itm if kind == "itm" else match.itc


@pytest.mark.parametrize("kind", ["itm", "itc"])
def test_captions_and_texts_are_matched_in_the_same_run(kind: ScoreKind, folder, config, pictures):
    with config.build() as reference:
        captions = [fake_caption(picture) for picture in pictures]
        of_captions = [of_kind(match, kind) for match in reference.score(pictures, captions)]
        of_texts = [of_kind(match, kind) for match in reference.score(pictures[:2], TEXTS)]
    outputs = Outputs.of(
        scores={"fit": "caption", "alt_fit": "alt"}, score_model=str(folder), score_kind=kind
    )
    stage = CaptionStage(CaptionSpec(engine=FAKE, outputs=outputs))
    table = stage(with_texts(pictures))
    assert table["caption"].to_pylist() == captions
    assert table["fit"].to_pylist() == pytest.approx(of_captions, abs=1e-5)
    assert table["alt_fit"].to_pylist()[:2] == pytest.approx(of_texts, abs=1e-5)
    assert table["alt_fit"].to_pylist()[2] is None
    matcher = stage._embeddings_and_scores._matcher
    assert matcher is not None and matcher.stats().num_images_encoded == 3, "once for both columns"
    assert stage.busy_s > stage.actor.stats().busy_s
    stage.close()


def test_a_run_that_makes_only_scores_loads_only_the_retrieval_checkpoint(folder, config, pictures):
    asked = ScoreSettings(input=("i",), output="o", text_column="alt", score_model=str(folder))
    builder = asked.job().builder
    assert isinstance(builder, MatchingConfig)
    assert asked.job().fingerprint(builder.info()).parts["model"] == config.info().digest
    stage = CaptionStage(replace(asked.job().spec(), text_prefix=""))
    table = stage(with_texts(pictures))
    with config.build() as reference:
        right = [match.itm for match in reference.score(pictures[:2], TEXTS)]
    assert table["score"].to_pylist()[:2] == pytest.approx(right, abs=0.02), "bfloat16 may be the default"
    assert "caption" not in table.column_names
    assert stage.busy_s > 0
    stage.close()


def test_the_checkpoint_and_the_kind_are_in_the_fingerprint(folder):
    def fingerprint(**changes):
        outputs = Outputs(score=("fit=caption",), **changes)
        return CaptionSettings(input=("i",), output="o", outputs=outputs).fingerprint(FAKE.info())

    plain, itm = fingerprint(), fingerprint(score_model=str(folder))
    itc = fingerprint(score_model=str(folder), score_kind="itc")
    assert itm.differences(plain) != [] and itc.differences(itm) == ["outputs.score_kind: 'itm' -> 'itc'"]
    assert fingerprint(score_model=str(folder), score_kind="itm") == itm


def test_a_pinned_revision_is_loaded_and_in_the_fingerprint(folder, monkeypatch):
    """Without it, a branch that moves during a run ends the run, and no later run has the same scores."""
    monkeypatch.setattr(
        "blip2_actor.checkpoints.checkpoint.fetch_from_hub",
        lambda name, revision, patterns: (folder, f"commit of {revision}"),
    )
    alone = ScoreSettings(
        input=("i",), output="o", text_column="alt", score_model="hub/name", score_revision="v2"
    ).job()
    outputs = Outputs(score=("fit=caption",), score_model="hub/name", score_revision="v2")
    with_captions = CaptionSettings(input=("i",), output="o", outputs=outputs)
    assert isinstance(alone.builder, MatchingConfig) and alone.builder.revision == "v2"
    assert alone.fingerprint(alone.builder.info()).parts["model"] == "commit of v2"
    assert isinstance(with_captions.builder, EngineConfig) and with_captions.builder.revision is None
    assert with_captions.fingerprint(FAKE.info()).parts["score_model"] == "commit of v2"


def test_a_checkpoint_for_images_of_another_size_is_refused(folder):
    """It would get images that have been resized twice."""
    outputs = Outputs(score=("fit=caption",), score_model=str(folder))
    with pytest.raises(ValueError, match="score_model must take images of 32 px as the model does, got 28"):
        CaptionSettings(input=("i",), output="o", outputs=outputs).fingerprint(FakeEngineConfig().info())


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"prompt": "p"}, "prompt"),
        ({"engine": EngineConfig(model="demo")}, "model"),
        ({"engine": EngineConfig(device_map="auto")}, "device_map"),
        ({"engine": EngineConfig(skip_cuda_graphs=True)}, "skip_cuda_graphs"),
    ],
)
def test_options_of_the_captioning_engine_are_refused_next_to_a_score_model(changes, option):
    with pytest.raises(ValueError, match=f"{option} must be left out with score_model"):
        ScoreSettings(input=("i",), output="o", text_column="t", score_model="m", **changes)


def test_options_of_scores_without_effect_are_refused():
    with pytest.raises(ValueError, match="score_kind must be left out"):
        Outputs(score=("a=caption",), score_kind="itc")
    with pytest.raises(ValueError, match="score_model must be left out without score"):
        Outputs(score_model="m")
    with pytest.raises(ValueError, match="score_revision must be left out without score_model"):
        ScoreSettings(input=("i",), output="o", text_column="t", score_revision="v2").job()
