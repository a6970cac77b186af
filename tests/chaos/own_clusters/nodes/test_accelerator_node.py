"""A driver without an accelerator: actors use those of the workers, and "auto" chooses the dtype for these.

The engine is a fake, so the accelerator is only a resource of Ray.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.ledger.ledger import Ledger
from pipeline.storage.folder import Folder
from tests.chaos.cluster import cluster, start_driver
from tests.integration.inputs import check_output, write_tars


@pytest.mark.timeout(300)
def test_captions_are_made_where_the_accelerator_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    truth = write_tars(tmp_path / "in", num_tars=2, rows_per_tar=30)
    output, log = tmp_path / "out", tmp_path / "log"
    settings = {"input": [str(tmp_path / "in")], "output": str(output)}
    with cluster(num_nodes=1, num_gpus=1) as nodes:
        driver = start_driver(nodes, settings, {"dtype": "auto"}, log)
        assert driver.wait() == 0, log.read_text()
    check_output(output, truth)
    run = Ledger(Folder(str(output))).require_run()
    assert run.fingerprint.parts["dtype"] == "bfloat16"


@pytest.mark.timeout(300)
def test_an_accelerator_that_hangs_is_left_out_and_costs_no_row(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    truth = write_tars(tmp_path / "in", num_tars=8, rows_per_tar=40)
    output, log = tmp_path / "out", tmp_path / "log"
    settings = {
        "input": [str(tmp_path / "in")],
        "output": str(output),
        "placement": {"min_actors": 2, "step_timeout_s": 3.0},
    }
    engine = {"hangs_on_device": "0", "seconds_per_image": 0.1, "max_batch": 8}
    with cluster(num_nodes=1, num_gpus=2) as nodes:
        driver = start_driver(nodes, settings, engine, log)
        assert driver.wait() == 0, log.read_text()
    check_output(output, truth)
    said = log.read_text()
    assert said.count("accelerator 0 of") >= 3 and "accelerator 1 of" not in said, said
    assert "is left out; the job goes on with 1 other" in said


@pytest.mark.timeout(300)
def test_the_only_accelerator_that_hangs_ends_the_job_with_its_name(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=30)
    settings = {
        "input": [str(tmp_path / "in")],
        "output": str(tmp_path / "out"),
        "placement": {"step_timeout_s": 1.0},
    }
    with cluster(num_nodes=1, num_gpus=1) as nodes:
        driver = start_driver(nodes, settings, {"hangs_on_device": "0"}, tmp_path / "log")
        assert driver.wait() == 1
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("blip2: accelerator 0 of ") and "there is no other" in last


PLAN = """
import sys
from blip2_actor.testing import FakeEngineConfig
from pipeline.plan.plan import plan
from pipeline.settings.placement import Placement
from pipeline.settings.plan_settings import PlanSettings

options = {"on_cluster": True, "price_per_hour": 36.0, "json": True}
settings = PlanSettings(input=(sys.argv[1],), placement=Placement(gpus_per_actor=1), **options)
sys.exit(plan(settings, FakeEngineConfig(dtype="auto", seconds_per_image=0.01)))
"""


@pytest.mark.timeout(300)
def test_a_plan_is_measured_by_the_accelerator_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """For the driver, "auto" means float32; for the fake accelerator, bfloat16."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    write_tars(tmp_path / "in", num_tars=2, rows_per_tar=30)
    with cluster(num_nodes=1, num_gpus=1) as nodes:
        environment = {**os.environ, "RAY_ADDRESS": nodes.address}
        command = [sys.executable, "-c", PLAN, str(tmp_path / "in")]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    plan = json.loads(found.stdout)
    assert (plan["model"]["dtype"], plan["place"]) == ("bfloat16", "its node")
    assert plan["input"]["num_rows"] == 60
    assert plan["cost"] == pytest.approx(plan["prediction"]["actor_s"] * 0.01)


@pytest.mark.timeout(300)
def test_a_plan_without_an_accelerator_in_the_cluster_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=2)
    with cluster(num_nodes=1) as nodes:
        environment = {**os.environ, "RAY_ADDRESS": nodes.address}
        command = [sys.executable, "-c", PLAN, str(tmp_path / "in")]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert found.returncode == 3, found.stderr
    assert "needs 1 GPU, and no node offers it" in found.stderr
