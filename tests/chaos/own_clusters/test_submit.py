"""`blip2 submit` to a real cluster: a job that ends, a second submission, and a stop."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray.job_submission import JobSubmissionClient

from blip2_actor.demo.scenes import SceneSampler, draw
from tests.integration.job.job_cluster import BIN, ROOT, job_cluster, job_environment

REFUSED_WITHIN_S = 30
"""Includes the submission, for which Ray copies the packages and starts two Pythons."""
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with job_environment() as variables:
        yield variables | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def dashboard(environment: dict[str, str]) -> Iterator[str]:
    with job_cluster({name: value for name, value in environment.items() if name != "PYTHONPATH"}) as address:
        yield address


@pytest.fixture
def start(dashboard: str, environment: dict[str, str], tmp_path: Path):
    """Submit a job on drawn scenes, from a folder that also holds an older output and files of the user."""
    scenes = SceneSampler("held_out", seed=0).sample(20)
    (tmp_path / "images").mkdir()
    for number, pixels in enumerate(draw(scenes, side_px=96)):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number:02}.png")
    (tmp_path / "folder/old/_blip2").mkdir(parents=True)
    (tmp_path / "folder/old/secret.parquet").write_bytes(b"x")
    (tmp_path / "folder/pipeline.py").write_text("raise SystemExit('the file of the user was imported')")

    def run(*flags: str, input: str = "images", output: str = "captions") -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-m", "pipeline", "submit", "--address", dashboard, *flags]
        command += ["caption", "--model", "demo", "--device", "cpu"]
        command += ["--input", str(tmp_path / input), "--output", str(tmp_path / output)]
        return subprocess.Popen(
            command,
            cwd=tmp_path / "folder",
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_a_job_is_followed_to_its_end_and_resumed_under_the_name_of_its_output(start, dashboard, tmp_path):
    status, out, err = ended(start())
    assert status == 0, out + err
    assert "sending blip2_actor and pipeline: " in out
    assert "20 rows = 20 ok + 0 failed" in out
    rows = [
        row for path in (tmp_path / "captions").glob("*.parquet") for row in pq.read_table(path).to_pylist()
    ]
    assert len(rows) == 20 and all(row["status"] == "ok" for row in rows)
    status, out, err = ended(start())
    assert status == 0, out + err
    jobs = [
        job for job in JobSubmissionClient(dashboard).list_jobs() if "captions-" in str(job.submission_id)
    ]
    first, second = sorted(str(job.submission_id) for job in jobs)
    assert second == f"{first}-2"
    assert f"the job {second} has ended with exit status 0" in out


def test_a_refused_job_ends_the_command_with_its_own_status(start):
    status, out, err = ended(start(input="nowhere", output="refused"))
    assert status == 3, out + err
    assert "no such file or folder" in out
    assert "has ended with exit status 3" in out


def test_a_typo_that_is_tried_again_ends_in_seconds_starts_nothing_and_is_noted(start, dashboard, tmp_path):
    """A RayJob retries by itself on a fresh cluster each time, so only the output can tell why it failed."""
    for _ in range(2):
        started = time.monotonic()
        status, out, err = ended(start(input="nowhere", output="typo"))
        assert status == 3, out + err
        assert time.monotonic() - started < REFUSED_WITHIN_S
    client = JobSubmissionClient(dashboard)
    ours = [job for job in client.list_jobs() if str(job.submission_id).startswith("blip2-typo-")]
    assert len(ours) == 2 and all(job.driver_info is None for job in ours), "no driver has joined the cluster"
    output = tmp_path / "typo"
    assert [path.name for path in output.rglob("*") if path.is_file()] == ["refused.json"]
    command = [sys.executable, "-m", "pipeline", "status", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3 and "no such file or folder" in done.stderr
    status, out, err = ended(start(output="typo"))
    assert status == 0 and "20 rows = 20 ok + 0 failed" in out, out + err


def test_a_second_submission_follows_the_job_that_runs_and_a_stop_says_what_is_kept(
    start, dashboard, environment, tmp_path
):
    status, out, err = ended(start("--no-wait", output="stopped"))
    assert status == 0, out + err
    submission_id = out.partition("submitted the job ")[2].partition(":")[0]
    following = start(output="stopped")
    assert following.stdout is not None
    assert f"the job {submission_id} runs already" in following.stdout.readline()
    while "output in" not in (line := following.stdout.readline()):  # until the driver is at work
        assert line, following.communicate()
    status, _, err = ended(start(input="images/00.png", output="stopped"))
    assert status == 1 and f"the job {submission_id} works on {tmp_path / 'stopped'} already" in err
    stop = [str(BIN / "ray"), "job", "stop", "--address", dashboard, submission_id]
    subprocess.run(stop, env=environment, check=True, capture_output=True, timeout=120)
    status, out, err = ended(following)
    assert status == 143, out + err
    assert f"was stopped; what it has finished is kept in {tmp_path / 'stopped'}" in out
    assert "stopped by SIGTERM; finished work is kept" in out or "stopped at once by SIGTERM" in out
    status, out, err = ended(start(output="stopped"))
    assert status == 0 and "20 rows = 20 ok + 0 failed" in out, out + err
