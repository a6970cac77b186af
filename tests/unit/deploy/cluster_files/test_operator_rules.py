"""The rules of the KubeRay operator, each broken once; `tests/contracts` checks the manifests themselves."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from deploy.check import placeholders
from deploy.cluster_files.operator_rules import complaints

CLUSTER = {
    "rayVersion": "2.60.0",
    "authOptions": {"mode": "token"},
    "enableInTreeAutoscaling": True,
    "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": 60},
    "headGroupSpec": {
        "rayStartParams": {"num-cpus": "0"},
        "labels": {"pool": "head"},
        "template": {"spec": {"containers": [{"name": "head"}]}},
    },
    "workerGroupSpecs": [
        {
            "groupName": "cpu",
            "minReplicas": 0,
            "maxReplicas": 2,
            "idleTimeoutSeconds": 5,
            "priority": 1,
            "template": {"spec": {"containers": [{"name": "worker"}]}},
        }
    ],
}
MANIFESTS: dict[str, dict[str, Any]] = {
    "RayCluster": {"kind": "RayCluster", "metadata": {"name": "c"}, "spec": CLUSTER},
    "RayJob": {
        "kind": "RayJob",
        "metadata": {"name": "j"},
        "spec": {
            "rayClusterSpec": CLUSTER,
            "entrypoint": "true",
            "backoffLimit": 3,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 60,
        },
    },
    "RayService": {
        "kind": "RayService",
        "metadata": {"name": "s", "annotations": {"ray.io/initializing-timeout": "1h30m"}},
        "spec": {"rayClusterConfig": CLUSTER, "upgradeStrategy": {"type": "NewCluster"}},
    },
}


def changed(kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest with values set, or removed by None, at paths such as `spec/workerGroupSpecs/0`."""
    manifest = copy.deepcopy(MANIFESTS[kind])
    for path, value in changes.items():
        *parents, last = path.split("/")
        place: Any = manifest
        for key in parents:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        place[last] = value
        if value is None:
            del place[last]
    return manifest


@pytest.mark.parametrize("kind", list(MANIFESTS))
def test_a_right_manifest_breaks_no_rule(kind: str) -> None:
    assert list(complaints(MANIFESTS[kind])) == []


HEAD, WORKER = "spec/headGroupSpec", "spec/workerGroupSpecs/0"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metadata/name": "a" * 54}, "at most 53 characters, got 54"),
        ({"metadata/name": "Blip2"}, "lower-case letters"),
        ({f"{HEAD}/template/spec/containers": []}, "headGroupSpec.template.spec.containers"),
        ({f"{WORKER}/template/spec/containers": []}, r"workerGroupSpecs[0].template.spec.containers"),
        ({f"{HEAD}/resources": {"CPU": "1"}}, "not in both"),
        ({f"{HEAD}/rayStartParams/labels": "a=b"}, "rayStartParams.labels must not be given"),
        ({f"{WORKER}/labels": {"pool": "a b"}}, "labels as Kubernetes writes them, got pool: a b"),
        ({f"{WORKER}/minReplicas": 3}, "minReplicas must be at most maxReplicas (2), got 3"),
        ({f"{WORKER}/minReplicas": -1}, "minReplicas must be at least 0, got -1"),
        ({f"{WORKER}/idleTimeoutSeconds": -1}, "idleTimeoutSeconds must be at least 0, got -1"),
        ({"spec/autoscalerOptions/idleTimeoutSeconds": -2}, "must be at least 0, got -2"),
        ({"spec/autoscalerOptions/version": "v1"}, "idleTimeoutSeconds needs autoscalerOptions.version: v2"),
        ({"spec/autoscalerOptions/version": "v1"}, "priority needs autoscalerOptions.version: v2"),
        ({"spec/rayVersion": "2.55.1"}, "priority needs rayVersion 2.56.0 or newer"),
        ({"spec/rayVersion": None}, "rayVersion must be 2.52.0 or newer for tokens, got None"),
        ({f"{WORKER}/suspend": True}, "suspend must not be given"),
        ({f"{WORKER}/template/spec/restartPolicy": "Always"}, "restartPolicy must be Never"),
        (
            {"spec/enableInTreeAutoscaling": False, f"{WORKER}/minReplicas": None},
            "must give minReplicas and maxReplicas",
        ),
        (
            {
                f"{HEAD}/template/spec/containers": [
                    {"env": [{"name": "RAY_enable_autoscaler_v2", "value": "1"}]}
                ]
            },
            "take away the variable RAY_enable_autoscaler_v2",
        ),
        (
            {"spec/autoscalerOptions/env": [{"name": "KUBERAY_GEN_AUTOSCALER_START_CMD"}]},
            "must not set KUBERAY_GEN_AUTOSCALER_START_CMD",
        ),
        (
            {f"{HEAD}/template/spec/containers": [{"env": [{"name": "RAY_REDIS_ADDRESS"}]}]},
            "gcsFaultToleranceOptions must be given",
        ),
        (
            {
                "spec/gcsFaultToleranceOptions": {"redisAddress": "r:6379"},
                f"{HEAD}/rayStartParams/redis-password": "x",
            },
            "take away rayStartParams.redis-password",
        ),
        ({"spec/gcsFaultToleranceOptions": {"storage": {"size": "1Gi"}}}, "for the backend rocksdb alone"),
        ({"spec/authOptions": {"enableK8sTokenAuth": True}}, "enableK8sTokenAuth needs mode: token"),
        (
            {"spec/rayVersion": "2.54.0", "spec/authOptions": {"mode": "token", "enableK8sTokenAuth": True}},
            "rayVersion must be 2.55.0 or newer for enableK8sTokenAuth, got 2.54.0",
        ),
    ],
)
def test_a_broken_rule_of_the_cluster_is_named(changes: dict[str, Any], said: str) -> None:
    assert said in "\n".join(complaints(changed("RayCluster", changes)))
    if not any(path.startswith("metadata") for path in changes):
        inside = {path.replace("spec", "spec/rayClusterSpec", 1): value for path, value in changes.items()}
        assert said in "\n".join(complaints(changed("RayJob", inside)))


RULE = {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "ttlSeconds": 60}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metadata/name": "a" * 48}, "at most 47 characters, got 48"),
        ({"spec/rayClusterSpec": None}, "rayClusterSpec must be given; list components/assemble"),
        ({"spec/backoffLimit": -1}, "backoffLimit must be at least 0, got -1"),
        ({"spec/activeDeadlineSeconds": 0}, "activeDeadlineSeconds must be at least 1, got 0"),
        ({"spec/preRunningDeadlineSeconds": 0}, "preRunningDeadlineSeconds must be at least 1, got 0"),
        ({"spec/ttlSecondsAfterFinished": -1}, "ttlSecondsAfterFinished must be at least 0, got -1"),
        ({"spec/shutdownAfterJobFinishes": False}, "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"),
        ({"spec/shutdownAfterJobFinishes": False, "spec/suspend": True}, "suspend needs"),
        ({"spec/clusterSelector": {"ray.io/cluster": "c"}}, "backoffLimit must be 0 with clusterSelector"),
        ({"spec/clusterSelector": {"cluster": "c"}}, "must name a cluster as ray.io/cluster"),
        ({"spec/submissionMode": "InteractiveMode"}, "backoffLimit must be 0"),
        ({"spec/submissionMode": "SidecarMode", "spec/submitterConfig": {"backoffLimit": 1}}, "SidecarMode"),
        (
            {
                "spec/submissionMode": "SidecarMode",
                "spec/rayClusterSpec/headGroupSpec/template/spec/restartPolicy": "Always",
            },
            "restartPolicy must be Never in SidecarMode, got Always",
        ),
        ({"spec/rayClusterSpec/authOptions/enableK8sTokenAuth": True}, "is not for a RayJob"),
        ({"spec/deletionStrategy": {}}, "must give deletionRules, or both onSuccess and onFailure"),
        ({"spec/deletionStrategy": {"onSuccess": {"policy": "DeleteSelf"}}}, "both onSuccess and onFailure"),
        ({"spec/deletionStrategy": {"deletionRules": [RULE]}}, "must not be given with shutdown"),
        ({"spec/deletionStrategy": {"deletionRules": [RULE, RULE]}}, "must not repeat DeleteCluster"),
        (
            {"spec/deletionStrategy": {"deletionRules": [RULE | {"policy": "DeleteWorkers"}]}},
            "must not say DeleteWorkers when enableInTreeAutoscaling is on",
        ),
        (
            {"spec/deletionStrategy": {"deletionRules": [RULE | {"condition": {}}]}},
            "must give jobStatus or jobDeploymentStatus",
        ),
        (
            {
                "spec/deletionStrategy": {
                    "deletionRules": [RULE, {"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED"}}]
                }
            },
            "workers first, then the cluster, then the job",
        ),
    ],
)
def test_a_broken_rule_of_the_job_is_named(changes: dict[str, Any], said: str) -> None:
    assert said in "\n".join(complaints(changed("RayJob", changes)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metadata/name": "a" * 48}, "at most 47 characters"),
        ({"metadata/annotations": {"ray.io/initializing-timeout": "soon"}}, "must be a time such as 30m"),
        ({"metadata/annotations": {"ray.io/initializing-timeout": "0"}}, "must be a time such as 30m"),
        ({"spec/upgradeStrategy/type": "Rolling"}, "upgradeStrategy.type must be NewCluster"),
        ({"spec/rayClusterDeletionDelaySeconds": -1}, "rayClusterDeletionDelaySeconds must be at least 0"),
        (
            {"spec/rayClusterConfig/headGroupSpec/headService": {"metadata": {"name": "x"}}},
            "headService.metadata.name must not be given",
        ),
        ({"spec/upgradeStrategy/type": "NewClusterWithIncrementalUpgrade"}, "stepSizePercent"),
        (
            {
                "spec/upgradeStrategy": {
                    "type": "NewClusterWithIncrementalUpgrade",
                    "clusterUpgradeOptions": {"stepSizePercent": 5, "intervalSeconds": 1},
                }
            },
            "gatewayClassName must be given",
        ),
        (
            {"spec/rayClusterConfig/workerGroupSpecs/0/minReplicas": 9},
            "spec.rayClusterConfig.workerGroupSpecs",
        ),
    ],
)
def test_a_broken_rule_of_the_endpoint_is_named(changes: dict[str, Any], said: str) -> None:
    assert said in "\n".join(complaints(changed("RayService", changes)))


def test_placeholders_are_found_wherever_they_stand() -> None:
    document = {"a": [{"b": "s3://YOUR_BUCKET/x"}, 3], "c": {"d": "YOUR_REGISTRY"}, "e": "yours", "f": None}
    assert list(placeholders(document)) == [("a[0].b", "YOUR_BUCKET"), ("c.d", "YOUR_REGISTRY")]
