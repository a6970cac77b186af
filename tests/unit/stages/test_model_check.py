"""A worker that finds another model than the driver must not add rows to the run."""

from dataclasses import replace

import pytest

from blip2_actor.testing.fake_engine import FakeEngineConfig
from pipeline.settings.caption_spec import CaptionSpec
from pipeline.stages.model_check import Models, require_same_models

SPEC = CaptionSpec(engine=FakeEngineConfig())
MODELS = Models.of(SPEC, SPEC.engine.info())


def test_the_same_models_pass():
    require_same_models(MODELS, Models.of(SPEC, SPEC.engine.info()))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            replace(MODELS, info=replace(MODELS.info, dtype="bfloat16")),
            "got float32 .*; add --dtype bfloat16",
        ),
        (replace(MODELS, info=replace(MODELS.info, digest="x")), "model must be .* the files at fake differ"),
        (replace(MODELS, score_digest="x", score_model="m"), "score_model must be .* the files at m differ"),
    ],
)
def test_another_model_is_refused_by_name(found, message):
    with pytest.raises(ValueError, match=message):
        require_same_models(MODELS, found)
