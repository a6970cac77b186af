"""A user calibrates on captions whose truth is known; a run then says how sure each caption is."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks.confidence import degrade
from blip2_actor import Calibration
from blip2_actor.demo.examples import make_examples
from pipeline.cli.main import main
from pipeline.inputs.reader import ReadOptions
from pipeline.progress import Console
from pipeline.run.prepare import prepare, prepare_retry
from pipeline.run.run_job import run_job
from pipeline.settings.fingerprint import FingerprintMismatch
from pipeline.settings.job_settings import CaptionSettings
from pipeline.settings.outputs import Outputs
from pipeline.settings.retry_settings import RetrySettings
from tests.engines import cpu_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


def write_input(folder: Path, number: int) -> None:
    """Write drawn scenes with their captions, half of the scenes hard to see, and one unreadable image."""
    examples, draw = make_examples("held_out", 3, number, num_processes=1), np.random.default_rng(0)
    images = []
    for n, image in enumerate(examples.images):
        file = io.BytesIO()
        Image.fromarray(degrade(image, "occlusion", 0.7, draw) if n % 2 else image).save(file, "PNG")
        images.append(file.getvalue())
    images[0] = b"damaged"
    truth = [str(caption) for caption in examples.captions]
    pq.write_table(pa.table({"image": images, "truth": truth}), folder / "in.parquet")


def run(settings: CaptionSettings) -> list[dict[str, Any]]:
    run_job(prepare(settings), Console(io.StringIO()))
    return pq.read_table(Path(settings.output) / "in.parquet.parquet").to_pylist()


def test_a_run_is_calibrated_and_the_next_one_says_how_sure_it_is(tmp_path: Path) -> None:
    write_input(tmp_path, 120)
    settings = CaptionSettings(
        input=(str(tmp_path / "in.parquet"),),
        output=str(tmp_path / "known"),
        engine=cpu_config("demo", skip_self_test=True),
        reading=ReadOptions(keep=("truth",)),
        max_failed_fraction=1.0,
    )
    assert "confidence" not in run(settings)[0]
    file = str(tmp_path / "c.json")
    assert main(["calibrate", settings.output, "--reference", "truth", "--into", file]) == 0
    calibration = Calibration.load(file)
    assert calibration.num_examples == 119 and calibration.auroc > 0.7

    outputs = Outputs(calibration=file, min_confidence=0.5)
    settings = dataclasses.replace(settings, output=str(tmp_path / "out"), outputs=outputs)
    damaged, *rows = run(settings)
    assert damaged["status"] == "undecodable" and damaged["confidence"] is None
    for row in rows:
        right = calibration.probability(row["logprob"], row["num_tokens"])
        assert row["confidence"] == pytest.approx(right, abs=1e-3)
        assert row["flags"] == (["abstained"] if row["confidence"] < 0.5 else []) and row["caption"]
    assert 0 < sum(bool(row["flags"]) for row in rows) < len(rows)
    assert main(["verify", settings.output]) == 0
    retried = run_job(prepare_retry(RetrySettings(output=settings.output)), Console(io.StringIO()))
    assert retried.by_status == {"ok": 119, "undecodable": 1}

    dataclasses.replace(calibration, intercept=9.0).save(file)
    with pytest.raises(FingerprintMismatch, match=r"confidence\.calibration"):
        prepare(settings)
    with pytest.raises(ValueError, match="calibration must be of captions with the prompt of this run"):
        prepare(dataclasses.replace(settings, output=str(tmp_path / "other"), prompt="a red"))
