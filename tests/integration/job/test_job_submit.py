"""`ray job submit` of the job to a real cluster, from a copy of the tree."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray.job_submission import JobStatus, JobSubmissionClient

from blip2_actor.demo.scenes import SceneSampler, draw
from tests.integration.job.job_cluster import BIN, ROOT, job_cluster, job_environment

# A cluster starts and ends, and a job with its own interpreter; this takes minutes on a busy machine.
pytestmark = pytest.mark.timeout(480)


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with job_environment() as variables:
        yield variables


@pytest.fixture(scope="module")
def dashboard(environment: dict[str, str]) -> Iterator[str]:
    with job_cluster(environment) as address:
        yield address


@pytest.mark.slow
def test_the_tree_is_submitted_and_captions_its_input(
    dashboard: str, environment: dict[str, str], tmp_path: Path
) -> None:
    scenes = SceneSampler("held_out", seed=0).sample(20)
    (tmp_path / "images").mkdir()
    for number, pixels in enumerate(draw(scenes, side_px=96)):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number:02}.png")
    submit = [str(BIN / "ray"), "job", "submit", "--address", dashboard, "--submission-id", "captions"]
    submit += ["--working-dir", ".", "--", "python", "-m", "pipeline", "caption"]
    submit += ["--model", "demo", "--device", "cpu"]
    submit += ["--input", str(tmp_path / "images"), "--output", str(tmp_path / "captions")]
    done = subprocess.run(submit, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    # The command exits with 0 or 1, regardless of the job's exit status.
    job = JobSubmissionClient(dashboard).get_job_info("captions")
    assert (job.status, job.driver_exit_code) == (JobStatus.SUCCEEDED, 0)
    [output] = (tmp_path / "captions").glob("*.parquet")
    rows = pq.read_table(output).to_pylist()
    assert [row["key"] for row in rows] == sorted(row["key"] for row in rows)
    assert len(rows) == 20
    assert all(row["status"] == "ok" and row["caption"].endswith("background") for row in rows)
