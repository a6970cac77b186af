"""The node types that the autoscaler may start: if misread, a job is refused that could run, or hangs."""

from __future__ import annotations

from pathlib import Path

import yaml

from pipeline.placement.node_types import NodeType, configuration_file, node_types_of

ROOT = Path(__file__).parents[3]


def test_the_committed_cluster_offers_accelerators_that_do_not_run_yet() -> None:
    kinds = {
        kind.name: kind for kind in node_types_of(yaml.safe_load((ROOT / "ray_cluster.yaml").read_text()))
    }
    accelerator = {"CPU": 8.0, "GPU": 1.0}
    assert kinds == {
        "cpu": NodeType("cpu", 32, {"CPU": 16.0}, {"pool": "cpu"}, 40),
        "cpu_on_demand": NodeType("cpu_on_demand", 4, {"CPU": 16.0}, {"pool": "cpu"}, 40),
        "accelerator": NodeType("accelerator", 8, accelerator, {"pool": "accelerator"}, 40),
        "accelerator_on_demand": NodeType(
            "accelerator_on_demand", 2, accelerator, {"pool": "accelerator"}, 40
        ),
    }


def test_no_type_may_start_more_nodes_than_the_cluster() -> None:
    kinds = {"head": {"resources": {"CPU": 4}}, "gpu": {"resources": {"GPU": 1}, "max_workers": 9}}
    kinds |= {"off": {"resources": {"GPU": 4}, "max_workers": 0}, "free": {"resources": {"CPU": 2}}}
    cluster = {"max_workers": 3, "head_node_type": "head", "available_node_types": kinds}
    assert [(kind.name, kind.max_nodes) for kind in node_types_of(cluster)] == [("gpu", 3), ("free", 3)]
    assert node_types_of({}) == ()


def test_the_configuration_is_that_of_this_cluster() -> None:
    """A machine may run the heads of several clusters."""
    line = [
        "python",
        "monitor.py",
        "--gcs-address=10.0.0.1:6379",
        "--autoscaling-config=/etc/ray/cluster.yaml",
    ]
    assert configuration_file(line, "10.0.0.1:6379") == "/etc/ray/cluster.yaml"
    assert configuration_file(line, "10.0.0.1:6380") is None
    assert configuration_file(line[:3], "10.0.0.1:6379") is None
