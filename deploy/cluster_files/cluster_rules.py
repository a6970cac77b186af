"""The KubeRay operator's rules for a RayCluster spec, alone or inside a RayJob or a RayService."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

Spec = Mapping[str, Any]

MIN_RAY_FOR_TOKENS = (2, 52)
MIN_RAY_FOR_K8S_TOKENS = (2, 55)
MIN_RAY_FOR_PRIORITY = (2, 56)
_RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


def cluster_complaints(spec: Spec, annotations: Spec, path: str = "spec") -> Iterator[str]:
    """Yield one sentence for each rule that the spec at a path of its manifest breaks."""
    head = spec.get("headGroupSpec") or {}
    env = _head_environment(spec)
    yield from _group(head, f"{path}.headGroupSpec")
    for index, group in enumerate(spec.get("workerGroupSpecs") or []):
        yield from _worker_group(group, spec, f"{path}.workerGroupSpecs[{index}]")
    yield from _fault_tolerance(spec, annotations, path)
    yield from _autoscaler(spec, env, path)
    yield from _authentication(spec, path)
    params = head.get("rayStartParams") or {}
    if "redis-username" in params or "REDIS_USERNAME" in env:
        yield f"{path}.gcsFaultToleranceOptions.redisUsername is the only place for the user of Redis"


def _group(group: Spec, path: str) -> Iterator[str]:
    if not _containers(group):
        yield f"{path}.template.spec.containers must hold at least one container"
    params = group.get("rayStartParams") or {}
    if group.get("resources") and any(params.get(name) for name in _RESOURCE_PARAMS):
        yield f"{path} must give resources either in rayStartParams or in resources, not in both"
    if "labels" in params:
        yield f"{path}.rayStartParams.labels must not be given; use {path}.labels"
    for key, value in (group.get("labels") or {}).items():
        if not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
            yield f"{path}.labels must be labels as Kubernetes writes them, got {key}: {value}"


def _worker_group(group: Spec, spec: Spec, path: str) -> Iterator[str]:
    yield from _group(group, path)
    low, high = group.get("minReplicas"), group.get("maxReplicas")
    if not spec.get("enableInTreeAutoscaling") and (low is None or high is None):
        yield f"{path} must give minReplicas and maxReplicas when enableInTreeAutoscaling is off"
    for name, number in (("minReplicas", low), ("maxReplicas", high)):
        if number is not None and number < 0:
            yield f"{path}.{name} must be at least 0, got {number}"
    if low is not None and high is not None and low > high:
        yield f"{path}.minReplicas must be at most maxReplicas ({high}), got {low}"
    idle_s = group.get("idleTimeoutSeconds")
    if idle_s is not None and idle_s < 0:
        yield f"{path}.idleTimeoutSeconds must be at least 0, got {idle_s}"
    if idle_s is not None and not _has_autoscaler_v2(spec):
        yield f"{path}.idleTimeoutSeconds needs autoscalerOptions.version: v2"
    if group.get("priority"):
        if _ray_version(spec) < MIN_RAY_FOR_PRIORITY:
            yield f"{path}.priority needs rayVersion 2.56.0 or newer, got {spec.get('rayVersion')}"
        if not _has_autoscaler_v2(spec):
            yield f"{path}.priority needs autoscalerOptions.version: v2"
    if group.get("suspend") and spec.get("enableInTreeAutoscaling"):
        yield f"{path}.suspend must not be given when enableInTreeAutoscaling is on"


def _fault_tolerance(spec: Spec, annotations: Spec, path: str) -> Iterator[str]:
    options = spec.get("gcsFaultToleranceOptions")
    env = _head_environment(spec)
    if options is None:
        if "RAY_REDIS_ADDRESS" in env and annotations.get("ray.io/ft-enabled") != "true":
            yield f"{path}.gcsFaultToleranceOptions must be given when the head has RAY_REDIS_ADDRESS"
        return
    params = (spec.get("headGroupSpec") or {}).get("rayStartParams") or {}
    given = {
        "the annotation ray.io/ft-enabled": annotations.get("ray.io/ft-enabled"),
        "the annotation ray.io/external-storage-namespace": annotations.get(
            "ray.io/external-storage-namespace"
        ),
        "rayStartParams.redis-password": params.get("redis-password"),
        "the variable REDIS_PASSWORD": "REDIS_PASSWORD" in env,
        "the variable RAY_REDIS_ADDRESS": "RAY_REDIS_ADDRESS" in env,
    }
    for name, value in given.items():
        if value:
            yield f"{path}.gcsFaultToleranceOptions must stand alone; take away {name}"
    if options.get("backend", "redis") == "redis" and options.get("storage"):
        yield f"{path}.gcsFaultToleranceOptions.storage is for the backend rocksdb alone"


def _autoscaler(spec: Spec, env: Mapping[str, str], path: str) -> Iterator[str]:
    options = spec.get("autoscalerOptions") or {}
    switch = "RAY_enable_autoscaler_v2"
    if not spec.get("enableInTreeAutoscaling"):
        if env.get(switch) in ("1", "true"):
            yield f"{path}.enableInTreeAutoscaling must be on when the head has {switch}"
    elif options.get("version") and switch in env:
        yield f"{path}.autoscalerOptions.version must stand alone; take away the variable {switch}"
    elif options.get("version") == "v2":
        groups = {"headGroupSpec": spec.get("headGroupSpec") or {}}
        groups |= {f"workerGroupSpecs[{i}]": g for i, g in enumerate(spec.get("workerGroupSpecs") or [])}
        for name, group in groups.items():
            policy = restart_policy(group)
            if policy != "Never":
                yield f"{path}.{name}: restartPolicy must be Never with the autoscaler v2, got {policy}"
    idle_s = options.get("idleTimeoutSeconds") or 0
    if idle_s < 0:
        yield f"{path}.autoscalerOptions.idleTimeoutSeconds must be at least 0, got {idle_s}"
    if any(variable["name"] == "KUBERAY_GEN_AUTOSCALER_START_CMD" for variable in options.get("env") or []):
        yield f"{path}.autoscalerOptions.env must not set KUBERAY_GEN_AUTOSCALER_START_CMD"


def _authentication(spec: Spec, path: str) -> Iterator[str]:
    options = spec.get("authOptions") or {}
    major, minor = MIN_RAY_FOR_K8S_TOKENS if options.get("enableK8sTokenAuth") else MIN_RAY_FOR_TOKENS
    if options.get("mode") == "token" and _ray_version(spec) < (major, minor):
        what = "enableK8sTokenAuth" if options.get("enableK8sTokenAuth") else "tokens"
        yield f"{path}.rayVersion must be {major}.{minor}.0 or newer for {what}, got {spec.get('rayVersion')}"
    if options.get("enableK8sTokenAuth") and (options.get("mode") != "token" or options.get("secretName")):
        yield f"{path}.authOptions.enableK8sTokenAuth needs mode: token and no secretName"


def restart_policy(group: Spec) -> str:
    """Return the policy of the pods of a group; the operator takes none as Never."""
    return _pod(group).get("restartPolicy") or "Never"


def _pod(group: Spec) -> Spec:
    return (group.get("template") or {}).get("spec") or {}


def _containers(group: Spec) -> list[Spec]:
    return _pod(group).get("containers") or []


def _head_environment(spec: Spec) -> dict[str, str]:
    """The variables of the head's first container, which is Ray's."""
    return {
        variable["name"]: variable.get("value", "")
        for container in _containers(spec.get("headGroupSpec") or {})[:1]
        for variable in container.get("env") or []
    }


def _has_autoscaler_v2(spec: Spec) -> bool:
    version = (spec.get("autoscalerOptions") or {}).get("version")
    switched_on = _head_environment(spec).get("RAY_enable_autoscaler_v2") in ("1", "true")
    return switched_on or bool(spec.get("enableInTreeAutoscaling") and version == "v2")


def _ray_version(spec: Spec) -> tuple[int, ...]:
    """Major and minor version, or () when there is none."""
    return tuple(int(part) for part in re.findall(r"\d+", spec.get("rayVersion") or "")[:2])
