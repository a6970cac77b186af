"""Every command is the same job with other outputs, and its caption stage gets the settings' values."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from blip2_actor import EngineConfig, GenerationOptions, ImageLimits
from blip2_actor.testing import FakeEngineConfig
from pipeline.fetching.fetch_settings import FetchSettings
from pipeline.inputs.reader import ReadOptions
from pipeline.settings.caption_spec import CaptionSpec
from pipeline.settings.demo_settings import DemoSettings
from pipeline.settings.from_dict import from_dict
from pipeline.settings.job_settings import CaptionSettings, EmbedSettings, ScoreSettings
from pipeline.settings.outputs import Outputs
from pipeline.settings.report_settings import ExportSettings

STORED_RUN = Path(__file__).parents[2] / "fixtures" / "stored_run" / "finished" / "_blip2" / "run.json"
"""Written by version 0.1.0."""


@pytest.mark.parametrize(
    "command",
    [
        EmbedSettings(input=("in",), output="out", limit=3),
        ScoreSettings(input=("in",), output="out", text_column="caption", prompt="a photo of"),
    ],
)
def test_the_other_commands_are_the_same_job(command):
    job = command.job()
    assert (job.input, job.output, job.limit) == (("in",), "out", command.limit)
    assert not job.outputs.caption
    assert from_dict(CaptionSettings, job.to_dict()) == job


def test_stored_settings_keep_the_names_of_the_first_version():
    """An older version, which knows no later name, must be able to resume a run of this version."""
    stored = json.loads(STORED_RUN.read_text())["settings"]
    settings = CaptionSettings(input=("in",), output="out", engine=EngineConfig(skip_self_test=True))
    values = settings.to_dict()
    assert {name: set(value) for name, value in values.items() if isinstance(value, dict)} == {
        name: set(value) for name, value in stored.items() if isinstance(value, dict)
    }
    assert set(values) == set(stored)
    assert from_dict(CaptionSettings, json.loads(json.dumps(values))) == settings


def test_a_newer_field_is_stored_only_if_it_is_set():
    """`retry` captions with the stored settings, so it must find the adapter and the image size there."""
    engine = EngineConfig(model="demo", adapter="some/adapter", image_size_px=96)
    settings = CaptionSettings(input=("in",), output="out", engine=engine)
    values = settings.to_dict()
    assert values["engine"]["adapter"] == "some/adapter"
    assert values["engine"]["image_size_px"] == 96
    assert "ignore_generation_config" not in values["engine"]
    assert from_dict(CaptionSettings, json.loads(json.dumps(values))) == settings


def test_the_image_size_is_in_the_fingerprint():
    engine = EngineConfig(model="demo", device="cpu", image_size_px=96)
    settings = CaptionSettings(input=("in",), output="out", engine=engine)
    assert settings.fingerprint(engine.info()).parts["image"]["size_px"] == 96


def test_the_spec_has_everything_that_the_stage_needs():
    """A setting that does not reach the stage is ignored silently."""
    engine, outputs = FakeEngineConfig(), Outputs(ask=("color=what?",))
    options, limits = GenerationOptions(num_beams=3), ImageLimits(max_pixels=9)
    settings = CaptionSettings(
        input=("in",),
        output="out",
        prompt="a photo of",
        reuse_identical=True,
        outputs=outputs,
        generation=options,
        limits=limits,
        fetching=FetchSettings(fetch_per_host=2),
    )
    assert settings.spec(engine) == CaptionSpec(
        engine=engine,
        options=options,
        prompt="a photo of",
        outputs=outputs,
        reuse_identical=True,
        limits=limits,
        fetch=FetchSettings(fetch_per_host=2),
        text_prefix="_blip2_text_",
    )
    of_rows = CaptionSettings(input=("in",), output="out", reading=ReadOptions(prompt_column="question"))
    assert of_rows.spec(engine).prompt_column == "prompt", "the readers rename the column"


@pytest.mark.parametrize(
    "ids",
    [{"suppress_tokens": (3, 2048)}, {"bad_words_ids": ((1, 2), (3, 2048))}],
    ids=lambda ids: next(iter(ids)),
)
def test_token_ids_that_the_model_does_not_have_are_refused_before_any_work(ids):
    """Every row used to be refused, one after another."""
    engine = EngineConfig(model="demo", device="cpu")
    info = engine.info()
    (name,) = ids
    settings = CaptionSettings(input=("in",), output="out", generation=GenerationOptions(**ids))
    with pytest.raises(ValueError, match=rf"{name} must be token ids below {info.vocab_size}, got 2048"):
        settings.spec(engine).check(info)
    settings.spec(engine).check(replace(info, vocab_size=2049))
    settings.spec(engine).check(replace(info, vocab_size=0))


def test_two_kinds_of_prompt_are_refused():
    message = "prompt_column cannot be given together with prompt"
    with pytest.raises(ValueError, match=message):
        CaptionSpec(prompt="a photo of", prompt_column="question")
    with pytest.raises(ValueError, match=message):
        CaptionSettings(
            input=("in",), output="out", prompt="a photo of", reading=ReadOptions(prompt_column="question")
        )


def test_an_empty_name_of_a_folder_is_refused():
    """Python reads it as the working folder; names of runs and inputs go through `open_filesystem`."""
    with pytest.raises(ValueError, match="into must be a folder on this machine, got ''"):
        ExportSettings(output="out", to="csv", into="")
    with pytest.raises(ValueError, match="output must be the name of a folder, got ''"):
        DemoSettings(output="")
