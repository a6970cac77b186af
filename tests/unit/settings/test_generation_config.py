"""A job takes options from `generation_config.json`, unless its run began without them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from blip2_actor import EngineConfig, GenerationOptions
from blip2_actor.checkpoints.checkpoint import DEMO_FOLDER
from pipeline.ledger.layout import output_name
from pipeline.ledger.ledger import Ledger
from pipeline.run.job import Job
from pipeline.run.prepare import prepare, prepare_retry
from pipeline.settings.fingerprint import FingerprintMismatch
from pipeline.settings.job_settings import CaptionSettings, EmbedSettings
from pipeline.settings.retry_settings import RetrySettings
from pipeline.storage.folder import Folder


@pytest.fixture
def engine(tmp_path: Path) -> EngineConfig:
    """The demonstration checkpoint, whose file asks for five beams."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in DEMO_FOLDER.iterdir():
        if path.name != "generation_config.json":
            (folder / path.name).symlink_to(path)
    (folder / "generation_config.json").write_text(json.dumps({"num_beams": 5, "max_new_tokens": 12}))
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "a.jpg").write_bytes(b"-")
    return EngineConfig(model=str(folder), device="cpu", dtype="float32")


def settings(tmp_path: Path, engine: EngineConfig, **changes) -> CaptionSettings:
    source = (str(tmp_path / "input"),)
    return CaptionSettings(input=source, output=str(tmp_path / "output"), engine=engine, **changes)


def ignoring(engine: EngineConfig) -> EngineConfig:
    return EngineConfig(model=engine.model, device="cpu", dtype="float32", ignore_generation_config=True)


def begin(job: Job) -> None:
    """Begin a run and leave it as if it were finished, so that it can be retried."""
    job.ledger.begin(job.run)
    for shard in job.run.shards:
        job.ledger.folder.put(output_name(shard.name), b"")


def chosen(job: Job) -> tuple[int, int]:
    options = job.settings.generation
    assert job.settings.spec(job.engine).options == options
    return options.num_beams, options.max_new_tokens


def test_a_new_run_takes_them_and_its_fingerprint_says_so(tmp_path, engine):
    job = prepare(settings(tmp_path, engine, generation=GenerationOptions(max_new_tokens=30)))
    assert chosen(job) == (5, 30)
    parts = job.run.fingerprint.parts
    assert parts["generation_config"] == {"max_new_tokens": 12, "num_beams": 5}
    assert (parts["options"]["num_beams"], parts["options"]["max_new_tokens"]) == (5, 30)
    begin(job)
    assert chosen(prepare_retry(RetrySettings(output=str(tmp_path / "output")))) == (5, 30)
    with pytest.raises(FingerprintMismatch, match=r"generation_config\.num_beams: 5 -> nothing"):
        prepare(settings(tmp_path, ignoring(engine), generation=GenerationOptions(max_new_tokens=30)))


def test_a_run_of_a_version_without_them_goes_on_without_them(tmp_path, engine):
    """Earlier versions ignored the file, so half of the rows would have other options than the rest."""
    first = prepare(settings(tmp_path, ignoring(engine)))
    assert "generation_config" not in first.run.fingerprint.parts
    stored = dict(first.run.settings)
    stored["engine"] = {
        name: value for name, value in stored["engine"].items() if name != "ignore_generation_config"
    }
    begin(dataclasses.replace(first, run=dataclasses.replace(first.run, settings=stored)))
    for again in (settings(tmp_path, engine), settings(tmp_path, ignoring(engine))):
        job = prepare(again)
        assert not job.is_new
        assert chosen(job) == (1, 30)
        assert job.engine == ignoring(engine)
    assert chosen(prepare_retry(RetrySettings(output=str(tmp_path / "output")))) == (1, 30)
    with pytest.raises(FingerprintMismatch, match=r"options\.num_beams: 1 -> 2"):
        prepare(settings(tmp_path, engine, generation=GenerationOptions(num_beams=2)))


def test_a_run_that_ignores_them_needs_the_flag_again(tmp_path, engine):
    """Without the flag, the command used to continue the run without the options that it had promised."""
    first = prepare(settings(tmp_path, ignoring(engine)))
    begin(first)
    with pytest.raises(FingerprintMismatch, match=r"generation_config\.num_beams: nothing -> 5"):
        prepare(settings(tmp_path, engine))
    assert chosen(prepare(settings(tmp_path, ignoring(engine)))) == (1, 30)
    assert chosen(prepare_retry(RetrySettings(output=str(tmp_path / "output")))) == (1, 30)


def test_a_job_without_texts_does_not_read_the_file(tmp_path, engine):
    Path(engine.model, "generation_config.json").write_text(json.dumps({"epsilon_cutoff": 0.5}))
    with pytest.raises(ValueError, match="'epsilon_cutoff', which is not supported"):
        prepare(settings(tmp_path, engine))
    source, output = (str(tmp_path / "input"),), str(tmp_path / "output")
    job = prepare(EmbedSettings(input=source, output=output, engine=engine).job())
    assert "generation_config" not in job.run.fingerprint.parts
    assert Ledger(Folder(output)).load() is None


def test_options_that_contradict_the_file_are_refused_before_work(tmp_path, engine):
    with pytest.raises(ValueError, match="must be at most num_beams"):
        prepare(settings(tmp_path, engine, generation=GenerationOptions(num_return_sequences=6)))
