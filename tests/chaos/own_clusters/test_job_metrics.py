"""A real job exports its metrics through Ray's agent, and its workers log as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray.cluster_utils import Cluster
from ray.util.metrics import Metric

from pipeline import metrics

WITHOUT_TROUBLE = {"blip2_store_retries", "blip2_replayed_calls", "blip2_device_failures"}
"""Metrics of failures; nothing fails in this job, so they are not exported."""


def test_a_job_exports_its_metrics_and_its_workers_log_where_a_row_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "200")  # the default of 10 s is longer than this job
    images = tmp_path / "images"
    images.mkdir()
    for number in range(600):
        Image.effect_noise((32, 32), 1 + number % 90).convert("RGB").save(images / f"{number}.png")
    (images / "7.png").write_bytes(b"no image")
    head = {"num_cpus": 4, "object_store_memory": 200 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        port = cluster.head_node.metrics_export_port
        command = [sys.executable, "-m", "pipeline", "caption", "--model", "demo", "--device", "cpu"]
        command += ["--input", str(images), "--output", str(tmp_path / "out"), "--log-level", "info"]
        command += ["--max-failed-fraction", "0.5"]
        log = tmp_path / "log"
        with log.open("w") as output:
            env = {**os.environ, "RAY_ADDRESS": cluster.address}
            job = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
        seen: dict[str, float] = {}
        while job.poll() is None:
            with contextlib.suppress(OSError):  # until the agent listens
                seen |= scraped(port)
        assert job.returncode == 0, log.read_text()
        messages = logged(Path(cluster.head_node.get_logs_dir_path()))
    finally:
        cluster.shutdown()
    expected = {metric.info["name"] for metric in vars(metrics).values() if isinstance(metric, Metric)}
    missing = [name for name in expected - WITHOUT_TROUBLE if not any(name in one for one in seen)]
    assert not missing, (missing, sorted(seen))
    record = json.loads((tmp_path / "out/_blip2/run.json").read_text())
    ours = [one for one in seen if one.startswith("ray_blip2_rows_total")]
    assert ours and all(f'run="{record["id"]}"' in one for one in ours)
    assert 0 < sum(value for one, value in seen.items() if one.startswith("ray_blip2_rows_total")) <= 600

    (shard,) = (path.name.removesuffix(".parquet") for path in (tmp_path / "out").glob("*.parquet"))
    (failed,) = [one for one in messages if one.get("status")]
    assert failed["message"].startswith("The row has failed: ")
    assert (failed["run"], failed["shard"], failed["status"]) == (record["id"], shard, "undecodable")
    assert failed["node"] == os.uname().nodename and failed["node_id"] and failed["worker_id"]
    rows = pq.read_table(tmp_path / "out" / f"{shard}.parquet").to_pylist()
    assert rows[failed["row"]]["key"] == "7.png"


def logged(folder: Path) -> list[dict[str, Any]]:
    """Return the messages of this project's loggers in the workers."""
    lines = [line for path in folder.glob("worker-*.err") for line in path.read_text().splitlines()]
    messages = [json.loads(line) for line in lines if line.startswith("{")]
    return [one for one in messages if one["name"].startswith(("pipeline", "blip2_actor"))]


def scraped(port: int) -> dict[str, float]:
    """Return this project's series, with their names and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        series: float(value) for series, value in re.findall(r"^(ray_blip2_\S+) (\S+)$", text, re.MULTILINE)
    }
