"""The driver of a cluster does not caption, so its own device must not decide anything."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import pytest

from blip2_actor import EngineConfig, QuantizationChoice
from blip2_actor.testing import FakeEngineConfig
from pipeline.placement.first_worker import WorkerAnswer, as_answered, describe_without_device
from pipeline.run.prepare import prepare
from pipeline.settings.deadline import RESERVE
from pipeline.settings.from_dict import from_dict
from pipeline.settings.job_settings import CaptionSettings
from tests.integration.inputs import write_tars

AUTO = FakeEngineConfig(dtype="auto")


@pytest.mark.parametrize(
    ("device", "dtype"), [("cuda", "float16"), ("cuda:3", "bfloat16"), ("auto", "float16")]
)
def test_a_driver_without_the_device_describes_the_model(device: str, dtype: str) -> None:
    """`--dtype float16` and `--device cuda` used to be refused because the head has no GPU."""
    info = describe_without_device(EngineConfig(model="demo", device=device, dtype=dtype))  # type: ignore[arg-type]
    assert info.dtype == dtype and info.digest == EngineConfig(model="demo").info().digest


def test_a_resume_takes_the_recorded_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to be refused on a machine with another dtype, and to reserve a whole GPU first."""
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=2)
    settings = CaptionSettings(input=(str(tmp_path / "in"),), output=str(tmp_path / "out"))
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    job = prepare(settings, AUTO)
    assert job.asks_worker
    answer = WorkerAnswer(dataclasses.replace(job.info, dtype="bfloat16"), None)
    job = job.with_answer(answer)
    assert job.run.fingerprint.parts["dtype"] == "bfloat16" and not job.asks_worker
    job.ledger.begin(job.run)
    for address in ("head:6379", ""):
        monkeypatch.setenv("RAY_ADDRESS", address)
        again = prepare(settings, AUTO)
        assert not again.asks_worker and again.info.dtype == "bfloat16"
        assert again.engine == as_answered(AUTO, "bfloat16", None)


def test_a_fork_of_another_dtype_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork is named by its fingerprint, in which the first worker has put the dtype."""
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=2)
    settings = CaptionSettings(input=(str(tmp_path / "in"),), output=str(tmp_path / "out"))
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    first = prepare(settings, AUTO)
    first.ledger.begin(first.run)
    other = dataclasses.replace(settings, fork=True, prompt="a photo of")
    fork = prepare(other, AUTO)
    fork = fork.with_answer(WorkerAnswer(dataclasses.replace(fork.info, dtype="bfloat16"), None))
    assert fork.is_new
    fork.ledger.begin(fork.run)
    again = prepare(other, AUTO)
    assert not again.is_new and again.ledger.folder.uri == fork.ledger.folder.uri
    assert again.info.dtype == "bfloat16"


@pytest.mark.parametrize("fork", [False, True])
def test_a_slow_start_keeps_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fork: bool) -> None:
    """Preparation takes time, so a deadline that could be met at first used to be refused."""
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=2)
    settings = CaptionSettings(input=(str(tmp_path / "in"),), output=str(tmp_path / "out"))
    if fork:
        first = prepare(settings, AUTO)
        first.ledger.begin(first.run)
    at = datetime.now(UTC) + timedelta(minutes=30)
    settings = dataclasses.replace(settings, fork=fork, prompt="a photo of", deadline=at.isoformat())

    class Clock(datetime):
        looks = -1

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            cls.looks += 1
            return datetime.now(tz) + timedelta(hours=cls.looks)

    monkeypatch.setattr("pipeline.settings.deadline.datetime", Clock)
    job = prepare(settings, AUTO)
    assert job.is_new and job.stop_at == at - RESERVE
    assert (job.ledger.folder.uri != settings.output) is fork


CHOICE = QuantizationChoice(
    method="int8", parts=("vision",), weight_bits=7, instructions="AVX2", time_fractions=(0.5,)
)


def test_all_workers_and_a_resume_quantize_what_the_first_worker_has_chosen(tmp_path: Path) -> None:
    """Each worker used to measure by itself, so one output had rows of several precisions."""
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=2)
    engine = EngineConfig(model="demo", device="cpu", dtype="float32", quantize="int8")
    settings = CaptionSettings(input=(str(tmp_path / "in"),), output=str(tmp_path / "out"), engine=engine)
    job = prepare(settings)
    assert job.asks_worker
    job = job.with_answer(WorkerAnswer(job.info, CHOICE))
    assert not job.asks_worker and job.engine == dataclasses.replace(engine, quantization_choice=CHOICE)
    job.ledger.begin(job.run)
    again = prepare(settings)
    assert not again.asks_worker and again.run.quantization == CHOICE
    assert again.engine.quantization_choice == CHOICE  # type: ignore[attr-defined]
    assert again.run.fingerprint == job.run.fingerprint
    other = job.joining(dataclasses.replace(job.run, quantization=dataclasses.replace(CHOICE, parts=())))
    assert other.engine.quantization_choice.parts == ()  # type: ignore[attr-defined]


def test_a_given_choice_is_kept_and_stored(tmp_path: Path) -> None:
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=2)
    engine = EngineConfig(model="demo", device="cpu", quantize="int8", quantization_choice=CHOICE)
    settings = CaptionSettings(input=(str(tmp_path / "in"),), output=str(tmp_path / "out"), engine=engine)
    job = prepare(settings)
    assert not job.asks_worker and job.run.quantization == CHOICE
    job.ledger.begin(job.run)
    assert from_dict(CaptionSettings, {**job.ledger.require_run().settings, "output": "out"}).engine == engine


def test_a_driver_without_the_device_does_not_decide_what_can_be_quantized() -> None:
    info = describe_without_device(EngineConfig(model="demo", quantize="int8"))
    assert info.quantize == "int8"
