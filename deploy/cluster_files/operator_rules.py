"""What the KubeRay operator refuses only after `kubectl apply` has accepted it.

The API server checks a manifest against the schema of its kind. The operator has more rules. When one is
broken, it says so only in the events of the object: nothing starts, and the terminal shows no error. These
are the rules of version 1.7 (`ray-operator/controllers/ray/utils/validation.go` in ray-project/kuberay),
without those for features that the operator has off by default.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from deploy.cluster_files.cluster_rules import Spec, cluster_complaints, restart_policy

MAX_CLUSTER_NAME_CHARS = 53
MAX_OWNER_NAME_CHARS = MAX_CLUSTER_NAME_CHARS - 6
"""A RayJob and a RayService name their cluster after themselves, with a hash."""

_DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_DURATION = re.compile(r"(\d+(\.\d+)?(h|m|s|ms|us|µs|ns))+|\d+")


def complaints(manifest: Spec) -> Iterator[str]:
    """Yield one sentence for each rule of the operator that a RayCluster, RayJob or RayService breaks."""
    spec = manifest.get("spec") or {}
    metadata = manifest.get("metadata") or {}
    annotations = metadata.get("annotations") or {}
    if manifest["kind"] == "RayCluster":
        yield from _name(metadata, MAX_CLUSTER_NAME_CHARS)
        yield from cluster_complaints(spec, annotations)
    elif manifest["kind"] == "RayJob":
        yield from _name(metadata, MAX_OWNER_NAME_CHARS)
        yield from _job(spec)
        if cluster := spec.get("rayClusterSpec"):
            yield from cluster_complaints(cluster, annotations, "spec.rayClusterSpec")
    elif manifest["kind"] == "RayService":
        yield from _name(metadata, MAX_OWNER_NAME_CHARS)
        yield from _service(spec, annotations)
        cluster = spec.get("rayClusterConfig") or {}
        yield from cluster_complaints(cluster, annotations, "spec.rayClusterConfig")


def _name(metadata: Spec, max_chars: int) -> Iterator[str]:
    name = metadata.get("name", "")
    if len(name) > max_chars:
        yield f"metadata.name must have at most {max_chars} characters, got {len(name)}"
    if not _DNS_LABEL.fullmatch(name):
        yield (
            "metadata.name must be lower-case letters, digits and hyphens, and begin with a letter, "
            f"got {name!r}"
        )


# The job ------------------------------------------------------------------------------------------------


def _job(spec: Spec) -> Iterator[str]:
    selector, mode = spec.get("clusterSelector"), spec.get("submissionMode", "K8sJobMode")
    if not spec.get("rayClusterSpec") and not selector:
        yield "spec.rayClusterSpec must be given; list components/assemble as the last component"
    if spec.get("suspend") and (selector or not spec.get("shutdownAfterJobFinishes")):
        yield "spec.suspend needs shutdownAfterJobFinishes: true and no clusterSelector"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not spec.get("shutdownAfterJobFinishes"):
        yield "spec.ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true"
    for name, least in (("ttlSecondsAfterFinished", 0), ("backoffLimit", 0), *_DEADLINES):
        if spec.get(name) is not None and spec[name] < least:
            yield f"spec.{name} must be at least {least}, got {spec[name]}"
    if selector and not selector.get("ray.io/cluster"):
        yield "spec.clusterSelector must name a cluster as ray.io/cluster"
    if spec.get("backoffLimit") and (selector or mode == "InteractiveMode"):
        yield "spec.backoffLimit must be 0 with clusterSelector and in InteractiveMode"
    if mode == "SidecarMode":
        for name in ("clusterSelector", "submitterPodTemplate", "submitterConfig"):
            if spec.get(name):
                yield f"spec.{name} must not be given in SidecarMode"
        policy = restart_policy((spec.get("rayClusterSpec") or {}).get("headGroupSpec") or {})
        if policy != "Never":
            path = "spec.rayClusterSpec.headGroupSpec"
            yield f"{path}: restartPolicy must be Never in SidecarMode, got {policy}"
    if ((spec.get("rayClusterSpec") or {}).get("authOptions") or {}).get("enableK8sTokenAuth"):
        yield "spec.rayClusterSpec.authOptions.enableK8sTokenAuth is not for a RayJob"
    if spec.get("deletionStrategy") is not None:
        yield from _deletion(spec)


_DEADLINES = (("activeDeadlineSeconds", 1), ("preRunningDeadlineSeconds", 1))
_DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")


def _deletion(spec: Spec) -> Iterator[str]:
    strategy, path = spec["deletionStrategy"], "spec.deletionStrategy"
    rules = strategy.get("deletionRules") or []
    ends = [strategy[name] for name in ("onSuccess", "onFailure") if name in strategy]
    if bool(rules) == bool(ends) or len(ends) == 1:
        yield f"{path} must give deletionRules, or both onSuccess and onFailure"
    if rules and spec.get("shutdownAfterJobFinishes"):
        yield f"{path}.deletionRules must not be given with shutdownAfterJobFinishes: true"
    policies = [part.get("policy") for part in [*rules, *ends]]
    if "DeleteNone" in policies and spec.get("shutdownAfterJobFinishes"):
        yield f"{path} must not say DeleteNone with shutdownAfterJobFinishes: true"
    if spec.get("clusterSelector") and {"DeleteCluster", "DeleteWorkers"} & set(policies):
        yield f"{path} must not delete a cluster that clusterSelector has found"
    if "DeleteWorkers" in policies and (spec.get("rayClusterSpec") or {}).get("enableInTreeAutoscaling"):
        yield f"{path} must not say DeleteWorkers when enableInTreeAutoscaling is on"
    times: dict[tuple[str | None, str | None], dict[str, int]] = {}
    for index, rule in enumerate(rules):
        condition = rule.get("condition") or {}
        if ("jobStatus" in condition) == ("jobDeploymentStatus" in condition):
            yield f"{path}.deletionRules[{index}].condition must give jobStatus or jobDeploymentStatus"
        when = condition.get("jobStatus"), condition.get("jobDeploymentStatus")
        of_policies = times.setdefault(when, {})
        if rule["policy"] in of_policies:
            yield f"{path}.deletionRules[{index}] must not repeat {rule['policy']} for the same condition"
        of_policies[rule["policy"]] = condition.get("ttlSeconds", 0)
    for of_policies in times.values():
        in_order = [of_policies[policy] for policy in _DELETION_ORDER if policy in of_policies]
        if in_order != sorted(in_order):
            yield f"{path}.deletionRules must delete workers first, then the cluster, then the job"


# The endpoint -------------------------------------------------------------------------------------------


_UPGRADES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")


def _service(spec: Spec, annotations: Spec) -> Iterator[str]:
    cluster = spec.get("rayClusterConfig") or {}
    timeout = annotations.get("ray.io/initializing-timeout")
    if timeout and (not _DURATION.fullmatch(timeout) or not re.search("[1-9]", timeout)):
        yield f"the annotation ray.io/initializing-timeout must be a time such as 30m, got {timeout!r}"
    if (cluster.get("authOptions") or {}).get("enableK8sTokenAuth"):
        yield "spec.rayClusterConfig.authOptions.enableK8sTokenAuth is not for a RayService"
    head_service = ((cluster.get("headGroupSpec") or {}).get("headService") or {}).get("metadata") or {}
    if head_service.get("name"):
        yield "spec.rayClusterConfig.headGroupSpec.headService.metadata.name must not be given"
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield "spec.rayClusterDeletionDelaySeconds must be at least 0"
    strategy = spec.get("upgradeStrategy") or {}
    if strategy.get("type") not in (None, *_UPGRADES):
        yield f"spec.upgradeStrategy.type must be {', '.join(_UPGRADES)}, got {strategy['type']}"
    if strategy.get("type") == "NewClusterWithIncrementalUpgrade":
        yield from _incremental_upgrade(strategy.get("clusterUpgradeOptions") or {}, cluster)


def _incremental_upgrade(options: Spec, cluster: Spec) -> Iterator[str]:
    path = "spec.upgradeStrategy.clusterUpgradeOptions"
    if not cluster.get("enableInTreeAutoscaling"):
        yield "spec.upgradeStrategy.type NewClusterWithIncrementalUpgrade needs enableInTreeAutoscaling: true"
    surge, step = options.get("maxSurgePercent", 100), options.get("stepSizePercent")
    if step is None or not 0 <= step <= surge <= 100:
        yield f"{path} must give stepSizePercent and maxSurgePercent with 0 <= step <= surge <= 100"
    if (options.get("intervalSeconds") or 0) <= 0:
        yield f"{path}.intervalSeconds must be greater than 0"
    if not options.get("gatewayClassName"):
        yield f"{path}.gatewayClassName must be given"
