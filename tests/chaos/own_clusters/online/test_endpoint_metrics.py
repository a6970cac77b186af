"""Prometheus scrapes a running endpoint: every rule evaluates, and the dashboard's queries find series."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.chaos.own_clusters.online.test_endpoint_lifecycle import ask, endpoint
from tests.integration.online.endpoint import wait_for
from tests.ports import free_port

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]
MONITORING = Path(__file__).parents[4] / "deploy/kubernetes/components/monitoring"
NOT_BROUGHT_ABOUT = ("refused", "error_counter", "shadow_requests", "trial_rows")
"""Metrics that appear only after trouble or with a model on trial."""
SCRAPE_EVERY_S = 12


@contextmanager
def prometheus(folder: Path, scraped: int) -> Iterator[str]:
    """Run Prometheus with the alert rules, scraping a port of this machine; yield its URL."""
    rules = yaml.safe_load((MONITORING / "alert_rules.yaml").read_text())["spec"]
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
    job = {"job_name": "ray", "static_configs": [{"targets": [f"127.0.0.1:{scraped}"]}]}
    timing = {"scrape_interval": f"{SCRAPE_EVERY_S}s", "evaluation_interval": "1s"}
    config = {"global": timing, "rule_files": ["rules.yaml"], "scrape_configs": [job]}
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = ["prometheus", "--config.file=prometheus.yaml", f"--storage.tsdb.path={folder / 'data'}"]
    process = subprocess.Popen(
        [*command, f"--web.listen-address=127.0.0.1:{port}"], cwd=folder, stderr=subprocess.DEVNULL
    )
    try:
        yield f"http://127.0.0.1:{port}/api/v1"
    finally:
        process.terminate()
        process.wait(30)


def panels() -> Iterator[tuple[str, str]]:
    for panel in json.loads((MONITORING / "dashboards/endpoint.json").read_text())["panels"]:
        for target in panel["targets"]:
            # Kubernetes sets the label `ray_io_cluster`; here there is one cluster without a name.
            yield panel["title"], target["expr"].replace("$cluster", ".*").replace("[5m]", "[1m]")


def test_prometheus_evaluates_the_rules_and_draws_the_panels(tmp_path: Path) -> None:
    metrics_port = free_port()
    with (
        endpoint(tmp_path, "--metrics-port", str(metrics_port)) as (url, _),
        prometheus(tmp_path, metrics_port) as api,
    ):

        def query(expression: str) -> list[Any]:
            try:
                answer = httpx.get(f"{api}/query", params={"query": expression})
            except httpx.TransportError:  # Prometheus is still starting
                return []
            found: list[Any] = answer.json()["data"]["result"]
            return found

        def use() -> None:
            for length in (4, 7):
                assert ask(url, max_new_tokens=length).status_code == 200
            assert httpx.post(f"{url}/v1/caption", headers={"content-encoding": "gzip"}).status_code == 415

        absent = [(t, e) for t, e in panels() if not any(name in e for name in NOT_BROUGHT_ABOUT)]
        deadline_s = time.monotonic() + 120
        while absent and time.monotonic() < deadline_s:
            use()  # rates need series that grow
            absent = [(title, expression) for title, expression in absent if not query(expression)]
        assert not absent, absent
        assert query('ray_blip2_http_request_duration_seconds_count{route="/v1/caption",code="200"} > 0')
        wait_for(lambda: all(rule["health"] == "ok" for rule in rules_of(api)))
        assert len(rules_of(api)) == (MONITORING / "alert_rules.yaml").read_text().count("- alert:")


def rules_of(api: str) -> list[dict[str, Any]]:
    groups = httpx.get(f"{api}/rules").json()["data"]["groups"]
    return [rule for group in groups for rule in group["rules"]]
