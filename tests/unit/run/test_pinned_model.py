"""A hub model is looked up once: a hundred workers used to ask, and a moved branch ended a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from blip2_actor import EngineConfig
from blip2_actor.checkpoints import checkpoint
from blip2_actor.checkpoints.checkpoint import DEMO_FOLDER
from blip2_actor.testing import IMAGE_SIZE_PX, FakeEngineConfig, save_tiny_retrieval_checkpoint
from pipeline.ledger.layout import output_name
from pipeline.run.job import Job
from pipeline.run.prepare import prepare, prepare_retry
from pipeline.settings.fingerprint import FingerprintMismatch
from pipeline.settings.job_settings import CaptionSettings, ScoreSettings
from pipeline.settings.outputs import Outputs
from pipeline.settings.retry_settings import RetrySettings
from tests.integration.inputs import as_table, png, write_tars

FIRST, SECOND = "1" * 40, "2" * 40


class Hub:
    """A hub whose main branch may move, and which records its requests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.main = FIRST
        self.asked: list[str | None] = []
        self.folder = DEMO_FOLDER
        monkeypatch.setattr(checkpoint, "fetch_from_hub", self.fetch)

    def fetch(self, model: str, revision: str | None, with_weights: bool) -> tuple[Path, str]:
        self.asked.append(revision)
        return self.folder, revision or self.main


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(monkeypatch)


def prepared(tmp_path: Path, **engine: str) -> Job:
    settings = CaptionSettings(
        input=(str(tmp_path / "in"),),
        output=str(tmp_path / "out"),
        engine=EngineConfig(model="me/model", device="cpu", dtype="float32", **engine),  # type: ignore[arg-type]
    )
    return prepare(settings)


def revision_of(job: Job) -> str | None:
    assert isinstance(job.engine, EngineConfig)
    return job.engine.revision


def test_workers_and_later_starts_take_the_commit_that_the_driver_has_found(tmp_path: Path, hub: Hub) -> None:
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=1)
    job = prepared(tmp_path)
    assert (hub.asked, revision_of(job)) == ([None], FIRST)
    assert job.run.settings["engine"]["revision"] is None, "what the user has given is stored as it was"
    job.ledger.begin(job.run)
    hub.main = SECOND
    hub.asked.clear()
    assert (revision_of(prepared(tmp_path)), hub.asked) == (FIRST, [FIRST])


def test_a_revision_that_is_named_is_taken_at_its_word(tmp_path: Path, hub: Hub) -> None:
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=1)
    job = prepared(tmp_path)
    job.ledger.begin(job.run)
    with pytest.raises(FingerprintMismatch):
        prepared(tmp_path, revision=SECOND)
    assert hub.asked[-1] == SECOND


def scoring(tmp_path: Path, is_alone: bool, model: str) -> tuple[CaptionSettings, FakeEngineConfig | None]:
    """Return a job that scores with a retrieval checkpoint, alone or next to captions, and its engine."""
    (tmp_path / "in").mkdir()
    table = as_table({"a": png(0)}).append_column("alt", [["a dog"]])
    pq.write_table(table, tmp_path / "in/a.parquet")
    places: dict[str, Any] = {"input": (str(tmp_path / "in"),), "output": str(tmp_path / "out")}
    if is_alone:
        cpu = EngineConfig(device="cpu", dtype="float32")
        return ScoreSettings(**places, text_column="alt", score_model=model, engine=cpu).job(), None
    outputs = Outputs(score=("fit=caption",), score_model=model)
    return CaptionSettings(**places, outputs=outputs), FakeEngineConfig(image_size_px=IMAGE_SIZE_PX)


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_retrieval_checkpoint_is_pinned_too(tmp_path: Path, hub: Hub, is_alone: bool) -> None:
    """Each worker used to ask the hub for it, and a moved branch ended the resume."""
    hub.folder = save_tiny_retrieval_checkpoint(tmp_path / "retrieval")
    settings, engine = scoring(tmp_path, is_alone, "me/itm")
    job = prepare(settings, engine)
    assert hub.asked[0] is None and set(hub.asked[1:]) == {FIRST}, "the hub is asked what its branch is once"
    assert job.settings.outputs.score_revision == FIRST, "what the workers take"
    assert job.run.settings["outputs"]["score_revision"] is None, (
        "what the user has given is stored as it was"
    )
    job.ledger.begin(job.run)
    hub.main = SECOND
    hub.asked.clear()
    job = prepare(settings, engine)
    assert job.settings.outputs.score_revision == FIRST and set(hub.asked) == {FIRST}


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_run_with_a_revision_of_a_folder_resumes(tmp_path: Path, is_alone: bool) -> None:
    """Version 0.1.0 left such a revision out; a new run refuses it."""
    plain, engine = scoring(tmp_path, is_alone, str(save_tiny_retrieval_checkpoint(tmp_path / "retrieval")))
    given = dataclasses.replace(plain, outputs=dataclasses.replace(plain.outputs, score_revision="v9"))
    with pytest.raises(ValueError, match="revision must be left out"):
        prepare(given, engine)
    job = prepare(plain, engine)
    job.ledger.begin(dataclasses.replace(job.run, settings=given.to_dict()))
    resumed = prepare(given, engine)
    for shard in job.run.shards:  # only a finished run can be retried
        job.ledger.folder.put(output_name(shard.name), b"")
    for again in (resumed, prepare_retry(RetrySettings(output=plain.output), engine)):
        assert again.settings.outputs.score_revision is None
        assert getattr(again.engine, "revision", None) is None
