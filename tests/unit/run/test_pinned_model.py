"""A hub model is looked up once: a hundred workers asked the hub, and a branch that had moved ended a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from blip2_actor import EngineConfig
from blip2_actor.checkpoints import checkpoint
from blip2_actor.checkpoints.checkpoint import DEMO_FOLDER
from blip2_actor.testing import IMAGE_SIZE_PX, FakeEngineConfig, save_tiny_retrieval_checkpoint
from pipeline.run.job import Job
from pipeline.run.prepare import prepare
from pipeline.settings.fingerprint import FingerprintMismatch
from pipeline.settings.job_settings import CaptionSettings, ScoreSettings
from pipeline.settings.outputs import Outputs
from tests.integration.inputs import as_table, png, write_tars

FIRST, SECOND = "1" * 40, "2" * 40


class Hub:
    """A hub whose main branch may move; it keeps what it is asked for."""

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


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_retrieval_checkpoint_is_pinned_too(tmp_path: Path, hub: Hub, is_alone: bool) -> None:
    """Each worker asked the hub for it, and a branch that had moved ended the resume."""
    (tmp_path / "in").mkdir()
    table = as_table({"a": png(0)}).append_column("alt", [["a dog"]])
    pq.write_table(table, tmp_path / "in/a.parquet")
    hub.folder = save_tiny_retrieval_checkpoint(tmp_path / "retrieval")
    places: dict[str, Any] = {"input": (str(tmp_path / "in"),), "output": str(tmp_path / "out")}
    engine: FakeEngineConfig | None = None
    if is_alone:
        cpu = EngineConfig(device="cpu", dtype="float32")
        settings = ScoreSettings(**places, text_column="alt", score_model="me/itm", engine=cpu).job()
    else:
        outputs = Outputs(score=("fit=caption",), score_model="me/itm")
        settings = CaptionSettings(**places, outputs=outputs)
        engine = FakeEngineConfig(image_size_px=IMAGE_SIZE_PX)
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
