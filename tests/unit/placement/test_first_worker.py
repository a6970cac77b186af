"""The driver of a cluster does not caption: what its own device is must not decide anything."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from blip2_actor import EngineConfig, ModelInfo
from blip2_actor.testing import FakeEngineConfig
from pipeline.placement.first_worker import describe_without_device, with_dtype
from pipeline.run.prepare import prepare
from pipeline.settings.job_settings import CaptionSettings
from tests.integration.inputs import write_tars

AUTO = FakeEngineConfig(dtype="auto")


@pytest.mark.parametrize(
    ("device", "dtype"), [("cuda", "float16"), ("cuda:3", "bfloat16"), ("auto", "float16")]
)
def test_a_driver_without_the_device_describes_the_model(device: str, dtype: str) -> None:
    """`--dtype float16` and `--device cuda` were refused, because the head has no GPU."""
    info = describe_without_device(EngineConfig(model="demo", device=device, dtype=dtype))  # type: ignore[arg-type]
    assert info.dtype == dtype and info.digest == EngineConfig(model="demo").info().digest


def test_a_resume_takes_the_recorded_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was refused on a machine whose device computes in another dtype, and asked a whole GPU first."""
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=2)
    settings = CaptionSettings(input=(str(tmp_path / "in"),), output=str(tmp_path / "out"))
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    job = prepare(settings, AUTO)
    assert job.asks_dtype
    answer: ModelInfo = dataclasses.replace(job.info, dtype="bfloat16")
    job = job.with_model(answer)
    assert job.run.fingerprint.parts["dtype"] == "bfloat16" and not job.asks_dtype
    job.ledger.begin(job.run)
    for address in ("head:6379", ""):
        monkeypatch.setenv("RAY_ADDRESS", address)
        again = prepare(settings, AUTO)
        assert not again.asks_dtype and again.info.dtype == "bfloat16"
        assert again.engine == with_dtype(AUTO, "bfloat16")


def test_a_fork_of_another_dtype_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork is named by its fingerprint, in which the first worker has put the dtype."""
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=2)
    settings = CaptionSettings(input=(str(tmp_path / "in"),), output=str(tmp_path / "out"))
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    first = prepare(settings, AUTO)
    first.ledger.begin(first.run)
    other = dataclasses.replace(settings, fork=True, prompt="a photo of")
    fork = prepare(other, AUTO)
    fork = fork.with_model(dataclasses.replace(fork.info, dtype="bfloat16"))
    assert fork.is_new
    fork.ledger.begin(fork.run)
    again = prepare(other, AUTO)
    assert not again.is_new and again.ledger.folder.uri == fork.ledger.folder.uri
    assert again.info.dtype == "bfloat16"
