"""Models overflow, especially in float16: a row whose vector or score is NaN or infinite must fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import inf, nan
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from blip2_actor import Engine, EngineConfig, GenerationOptions, MatchingEngine
from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.testing import random_images, save_tiny_checkpoint, save_tiny_retrieval_checkpoint
from pipeline.settings.caption_spec import CaptionSpec
from pipeline.settings.job_settings import CaptionSettings
from pipeline.settings.outputs import Outputs, ScoreKind
from pipeline.stages.caption import CaptionStage
from tests.engines import cpu_config
from tests.unit.stages.decoded_tables import decoded

OPTIONS = GenerationOptions(max_new_tokens=4)
VECTORS = Outputs.of(embeds={"seen": "vision", "mean": "qformer"}, scores={"fit": "alt"}, caption=False)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CaptionStage]:
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("opt"))
    engine = cpu_config(folder)
    started = CaptionStage(CaptionSpec(engine=engine, options=OPTIONS, outputs=VECTORS))
    yield started
    started.close()


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_retrieval_checkpoint(tmp_path_factory.mktemp("retrieval"))


def table() -> pa.Table:
    """Three images with texts, the second of them black."""
    pictures = random_images(3).numpy()
    pictures[1] = 0
    return decoded(pictures, alt=pa.array(["a dog", "a cat", "a dog"]))


def check_that_only_the_black_one_failed(made: pa.Table, names: Sequence[str]) -> None:
    assert made["status"].to_pylist() == ["ok", "failed", "ok"]
    assert "NaN or infinity" in made["error"][1].as_py()
    for name in names:
        values = made[name].to_pylist()
        assert values[1] is None
        assert np.isfinite(values[0]).all() and np.isfinite(values[2]).all()


@pytest.mark.parametrize("bad", [nan, inf])
@pytest.mark.parametrize("part", ["pooler_output", "qformer_features", "prefix"])
def test_one_nan_or_infinity_fails_its_row(stage: CaptionStage, monkeypatch, part: str, bad: float):
    """The language model that computes the score reads the prefix; each vector comes from its own part."""
    assert isinstance(stage.actor.engine, Engine)
    encode: Callable[[Sequence[EncodedImage]], None] = stage.actor.engine._core.runner.encode

    def spoil(encoded: Sequence[EncodedImage]) -> None:
        encode(encoded)
        for image in encoded:
            if not image.pixels.any():
                spoiled = getattr(image, part).clone()
                spoiled.view(-1)[3] = bad
                setattr(image, part, spoiled)

    monkeypatch.setattr(stage.actor.engine._core.runner, "encode", spoil)
    check_that_only_the_black_one_failed(stage(table()), VECTORS.names)


@pytest.mark.parametrize("bad", [nan, inf])
@pytest.mark.parametrize(
    ("kind", "method"), [("itm", "matching_logits"), ("itc", "contrastive_scores")], ids=["itm", "itc"]
)
def test_a_match_that_is_nan_or_infinite_fails_its_row(
    retrieval: Path, monkeypatch, kind: ScoreKind, method: str, bad: float
):
    outputs = Outputs(caption=False, score=("fit=alt",), score_model=str(retrieval), score_kind=kind)
    engine = EngineConfig(device="cpu", dtype="float32", num_threads=1)
    settings = CaptionSettings(input=("in",), output="out", engine=engine, outputs=outputs)
    stage = CaptionStage(replace(settings.spec(), text_prefix=""))
    assert isinstance(stage.actor.engine, MatchingEngine)
    compute = getattr(stage.actor.engine.model, method)

    def spoil(*args: torch.Tensor) -> torch.Tensor:
        found = compute(*args)
        found[1] = bad
        return found

    monkeypatch.setattr(stage.actor.engine.model, method, spoil)
    check_that_only_the_black_one_failed(stage(table()), ["fit"])
    stage.close()
