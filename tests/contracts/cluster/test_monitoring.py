"""Alert rules and dashboards: each expression uses only metrics and labels that are exported."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.util.metrics import Counter, Histogram, Metric

from deploy.observe import metrics as of_endpoint
from pipeline import metrics as of_job

ROOT = Path(__file__).parents[3]
MONITORING = ROOT / "deploy/kubernetes/components/monitoring"
RULES: list[dict[str, Any]] = yaml.safe_load((MONITORING / "alert_rules.yaml").read_text())["spec"]["groups"]
OURS = [
    metric
    for module in (of_job, of_endpoint)
    for metric in vars(module).values()
    if isinstance(metric, Metric)
]
ADDED_BY_PROMETHEUS = {"le", "ray_io_cluster"}
"""The bound of a histogram's bucket, and the label that pod_monitors.yaml copies from the pods."""


def alerts() -> Iterator[dict[str, Any]]:
    for group in RULES:
        yield from group["rules"]


def expressions() -> Iterator[str]:
    for alert in alerts():
        yield alert["expr"]
    for file in (MONITORING / "dashboards").glob("*.json"):
        for panel in json.loads(file.read_text())["panels"]:
            yield from (target["expr"] for target in panel["targets"])


def exported(metric: Metric) -> set[str]:
    """Return Prometheus' names for a metric of the job or the endpoint."""
    name = f"ray_{metric.info['name']}".removesuffix("_total")
    if isinstance(metric, Counter):
        return {f"{name}_total"}
    if isinstance(metric, Histogram):
        return {f"{name}_{ending}" for ending in ("bucket", "sum", "count")}
    return {name}


def names_of_ray() -> set[str]:
    """Return the names of Serve's and the autoscaler's metrics, from their source, with every suffix."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.origin is not None
    ray = Path(spec.origin).parent
    serve = "\n".join(file.read_text() for file in (ray / "serve/_private").glob("*.py"))
    serve = serve.replace("{protocol_name}", "http")
    found = {f"ray_{name}" for name in re.findall(r'"(serve_\w+)"', serve)}
    # Ray declares more metrics for the autoscaler than its version 2, which runs here, sets.
    version_2 = "\n".join(file.read_text() for file in (ray / "autoscaler/v2").rglob("*.py"))
    found |= {f"autoscaler_{name}" for name in re.findall(r"_prom_metrics\.(\w+)", version_2)}
    return found | {f"{name}_{ending}" for name in found for ending in ("total", "bucket", "sum", "count")}


def named(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:ray|autoscaler)_\w+", expression)) - ADDED_BY_PROMETHEUS


def test_each_expression_names_metrics_that_exist() -> None:
    known = names_of_ray().union(*map(exported, OURS))
    assert len(list(expressions())) >= 25
    for expression in expressions():
        assert named(expression), expression
        assert named(expression) <= known, f"{named(expression) - known} in {expression}"
    assert not named("rate(ray_blip2_rowz_total[5m])") <= known


def test_no_alert_waits_for_a_number_that_is_too_small() -> None:
    """Ray exports a gauge for 20 s after it was last set, so a dead replica has no series rather than 0."""
    for alert in alerts():
        assert not re.search(r"<|== ?0", alert["expr"]), alert["alert"]


def test_each_label_of_ours_exists() -> None:
    labels = {name: set(metric.info["tag_keys"]) for metric in OURS for name in exported(metric)}
    for expression in expressions():
        for name, selector in re.findall(r"(ray_blip2_\w+)\{([^}]*)\}", expression):
            used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)) - ADDED_BY_PROMETHEUS
            assert used <= labels[name], expression
        of_ours = set().union(*(labels[name] for name in named(expression) if name in labels))
        if of_ours and not any("autoscaler" in name for name in named(expression)):
            for grouped in re.findall(r"\bby \(([^)]*)\)", expression):
                assert {label.strip() for label in grouped.split(",")} - ADDED_BY_PROMETHEUS <= of_ours


def test_every_metric_of_ours_is_looked_at_and_documented() -> None:
    documented = (ROOT / "docs/monitoring.md").read_text()
    looked_at = set().union(*map(named, expressions()))
    for metric in OURS:
        assert exported(metric) & looked_at, metric.info["name"]
        labels = " ".join(f"`{label}`" for label in metric.info["tag_keys"])
        name = f"ray_{metric.info['name']}".removesuffix("_total")
        name += "_total" if isinstance(metric, Counter) else ""
        assert re.search(rf"^\| `{name}` \| .*\| {re.escape(labels)} *\|", documented, re.MULTILINE), name
    listed = set(re.findall(r"^\| `(ray_blip2_\w+)`", documented, re.MULTILINE))
    assert len(listed) == len(OURS)


def test_every_alert_says_what_is_wrong_and_what_to_do() -> None:
    for alert in alerts():
        assert set(alert["annotations"]) == {"summary", "action"}
        assert alert["labels"]["severity"] in ("warning", "critical")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool comes with the package prometheus")
def test_prometheus_takes_the_rules_and_they_fire_when_they_should(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": RULES}))
    open_shards = _series('ray_blip2_shards{state="open"}', "5x60")
    rows = _series('ray_blip2_rows_total{status="ok"}', "0+80x60")
    failed = _series('ray_blip2_rows_total{status="undecodable"}', "0+20x60")
    answers = _series(
        'ray_blip2_http_request_duration_seconds_count{route="/v1/caption",code="200"}', "0+100x60"
    )
    refused = _series('ray_blip2_refused_requests_total{reason="overloaded"}', "0+10x60")
    of_quota = _series('ray_blip2_refused_requests_total{reason="quota"}', "0+10x60")
    of_another_run = _series('ray_blip2_rows_total{status="ok",run="b"}', "0+80x60")
    wanted = _series('ray_serve_autoscaling_target_replicas{deployment="Captioner"}', "1x60")
    unwanted = _series('ray_serve_autoscaling_target_replicas{deployment="Captioner"}', "0x60")
    wakes = _series('ray_serve_autoscaling_target_replicas{deployment="Captioner"}', "0x45 1x15")
    healthy = _series('ray_serve_deployment_replica_healthy{deployment="Captioner",replica="a"}', "1x60")
    ended = _series('ray_serve_deployment_replica_healthy{deployment="Captioner",replica="a"}', "1x10")
    waiting = _series("ray_blip2_engine_waiting", "3x60")
    steps = _series('ray_blip2_engine_step_seconds_count{work="decode"}', "0+50x60")

    def waits(within_1_s: str) -> list[dict[str, str]]:
        """100 requests a minute, some of which wait for less than a second, and all for less than five."""
        buckets = {"1.0": within_1_s, "5.0": "0+100x60", "+Inf": "0+100x60"}
        return [_series(f'ray_blip2_queue_seconds_bucket{{le="{le}"}}', x) for le, x in buckets.items()]

    cases = [
        ([open_shards], "Blip2JobMakesNoProgress", "critical", True),
        ([open_shards, rows], "Blip2JobMakesNoProgress", "critical", False),
        ([open_shards, of_another_run], "Blip2JobMakesNoProgress", "critical", True),
        ([open_shards, rows], "Blip2JobRowsFail", "warning", False),
        ([rows, failed], "Blip2JobRowsFail", "warning", True),
        ([wanted, ended], "Blip2EndpointLacksReplicas", "critical", True),
        ([wanted, healthy], "Blip2EndpointLacksReplicas", "critical", False),
        ([wakes, ended], "Blip2EndpointLacksReplicas", "critical", False),
        ([unwanted, ended], "Blip2EndpointLacksReplicas", "critical", False),
        ([wanted], "Blip2EndpointLacksReplicas", "critical", False),
        ([answers, refused], "Blip2EndpointRefuses", "warning", True),
        ([answers, of_quota], "Blip2EndpointRefuses", "warning", False),
        ([*waits("0+5x60")], "Blip2EndpointQueues", "warning", True),
        ([*waits("0+100x60")], "Blip2EndpointQueues", "warning", False),
        ([waiting], "Blip2EngineStalls", "critical", True),
        ([waiting, steps], "Blip2EngineStalls", "critical", False),
    ]
    tests = [
        {"interval": "1m", "input_series": series, "alert_rule_test": [_fires(alert, severity, is_firing)]}
        for series, alert, severity, is_firing in cases
    ]
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": tests}))
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", "tests.yaml"]):
        done = subprocess.run(
            ["promtool", *command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def _series(name: str, values: str) -> dict[str, str]:
    return {"series": name, "values": values}


def _fires(alert: str, severity: str, is_firing: bool) -> dict[str, Any]:
    (annotations,) = [one["annotations"] for one in alerts() if one["alert"] == alert]
    said = {name: text.replace("{{ $labels.deployment }}", "Captioner") for name, text in annotations.items()}
    labels = {"severity": severity} | ({"deployment": "Captioner"} if said != annotations else {})
    firing = [{"exp_labels": labels, "exp_annotations": said}] if is_firing else []
    return {"eval_time": "50m", "alertname": alert, "exp_alerts": firing}
