"""The Kubernetes manifests as `kubectl kustomize` builds them, against the operator's schemas and rules."""

from __future__ import annotations

import copy
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from deploy.app import ServeArgs
from deploy.check import check_manifests, placeholders
from pipeline.placement.node_types import node_types_of
from tests.contracts.cluster.kuberay_schema import KINDS, load_schemas

ROOT = Path(__file__).parents[3]
MANIFESTS = ROOT / "deploy/kubernetes"
CLUSTER_PATHS = {
    "RayCluster": ("spec",),
    "RayJob": ("spec", "rayClusterSpec"),
    "RayService": ("spec", "rayClusterConfig"),
}
OVERLAYS = ("cluster", "job", "endpoint")
COMBINATIONS = (
    ("base", "kueue", "gpu", "monitoring"),
    ("rayjob", "s3", "model_cache", "kueue", "gpu", "monitoring", "assemble"),
    ("rayservice", "gcs", "cpu", "model_cache", "assemble"),
    ("rayjob", "cpu", "assemble"),
)
Manifest = dict[str, Any]

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl builds the manifests")


@functools.cache
def build(overlay: str) -> list[Manifest]:
    """The output of `kubectl kustomize` for an overlay of the project."""
    return _kustomize(MANIFESTS / "overlays" / overlay)


@functools.cache
def combine(resource: str, *components: str) -> list[Manifest]:
    """The output for an overlay as users write it: one resource, and components in this order."""
    with tempfile.TemporaryDirectory() as folder:
        there = os.path.relpath(MANIFESTS, os.path.realpath(folder))
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [f"{there}/{resource}"],
            "components": [f"{there}/components/{name}" for name in components],
        }
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return _kustomize(Path(folder))


def _kustomize(folder: Path) -> list[Manifest]:
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


def everything() -> Iterator[Manifest]:
    for overlay in OVERLAYS:
        yield from build(overlay)
    for combination in COMBINATIONS:
        yield from combine(*combination)


def of_kind(manifests: list[Manifest], *kinds: str) -> Manifest:
    (found,) = [manifest for manifest in manifests if manifest["kind"] in kinds]
    return found


def cluster_of(manifest: Manifest) -> Manifest:
    for key in CLUSTER_PATHS[manifest["kind"]]:
        manifest = manifest[key]
    return manifest


def pods_of(manifest: Manifest) -> Iterator[Manifest]:
    """Return the pod templates of a manifest, with the labels that the operator adds."""
    if manifest["kind"] == "StatefulSet":
        yield manifest["spec"]["template"]
    if manifest["kind"] == "RayJob":
        yield manifest["spec"]["submitterPodTemplate"]
    if manifest["kind"] in KINDS:
        cluster = cluster_of(manifest)
        groups = [(cluster["headGroupSpec"], {"ray.io/node-type": "head", "ray.io/group": "headgroup"})]
        for group in cluster["workerGroupSpecs"]:
            groups.append((group, {"ray.io/node-type": "worker", "ray.io/group": group["groupName"]}))
        for group, labels in groups:
            pod = group["template"]
            yield pod | {"metadata": {"labels": pod["metadata"]["labels"] | labels}}


def schema_errors(manifest: Manifest) -> list[str]:
    validator = jsonschema.Draft202012Validator(load_schemas()[manifest["kind"]])
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


def test_the_operator_takes_each_of_its_objects() -> None:
    """The API server silently drops a field that is not in the schema; here it is an error."""
    kinds = set()
    for manifest in everything():
        if manifest["kind"] in KINDS:
            kinds.add(manifest["kind"])
            assert not schema_errors(manifest)
    assert kinds == set(KINDS)
    job = of_kind(build("job"), "RayJob")
    wrong = job | {"spec": job["spec"] | {"rayClusterspec": {}}}
    assert "rayClusterspec" in str(schema_errors(wrong))
    head = cluster_of(job)["headGroupSpec"]
    pod = head["template"]["spec"] | {"tolerantions": []}
    head = head | {"template": head["template"] | {"spec": pod}}
    wrong = job | {"spec": job["spec"] | {"rayClusterSpec": cluster_of(job) | {"headGroupSpec": head}}}
    assert "tolerantions" in str(schema_errors(wrong))


def test_nothing_breaks_a_rule_of_the_operator_or_of_serve() -> None:
    check_manifests(list(everything()))


def test_each_overlay_leaves_only_values_of_the_user_open() -> None:
    found = {overlay: {name for _, name in placeholders(build(overlay))} for overlay in OVERLAYS}
    assert found == {
        "cluster": {"YOUR_REGISTRY"},
        "job": {"YOUR_REGISTRY", "YOUR_BUCKET"},
        "endpoint": {"YOUR_REGISTRY"},
    }


def test_job_endpoint_and_permanent_cluster_are_one_cluster() -> None:
    clusters = {name: copy.deepcopy(cluster_of(of_kind(build(name), *KINDS))) for name in OVERLAYS}
    redis = clusters["endpoint"].pop("gcsFaultToleranceOptions")
    assert redis["redisAddress"] == "blip2-redis:6379" and "gcsFaultToleranceOptions" not in clusters["job"]
    for overlay, cluster in clusters.items():
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            labels = group["template"].pop("metadata")["labels"]
            component = {} if overlay == "cluster" else {"app.kubernetes.io/component": overlay}
            assert labels == {"app.kubernetes.io/part-of": "blip2"} | component
    assert clusters["job"] == clusters["cluster"] == clusters["endpoint"]
    accelerators = clusters["cluster"]["workerGroupSpecs"][1]
    assert accelerators["minReplicas"] == accelerators["replicas"] == 0
    pod = accelerators["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["tolerations"] and pod["nodeSelector"]
    assert pod["containers"][0]["image"] == "YOUR_REGISTRY/blip2:0.1.0-cuda"
    head = clusters["cluster"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert head["image"] == "YOUR_REGISTRY/blip2:0.1.0-cpu"


def test_every_pod_meets_the_restricted_security_standard_with_a_read_only_root() -> None:
    """What the namespace label pod-security.kubernetes.io/enforce=restricted requires, and one step more."""
    for manifest in everything():
        for pod in pods_of(manifest):
            spec = pod["spec"]
            assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            contexts = [container["securityContext"] for container in spec["containers"]]
            if manifest["kind"] in KINDS and "autoscalerOptions" in cluster_of(manifest):
                contexts.append(cluster_of(manifest)["autoscalerOptions"]["securityContext"])
            assert contexts == [
                {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                }
            ] * len(contexts)
            for container in spec["containers"]:
                assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]
            assert {next(iter(set(volume) - {"name"})) for volume in spec.get("volumes", [])} <= {
                "emptyDir",
                "secret",
                "persistentVolumeClaim",
            }


def test_only_the_head_may_talk_to_the_api_server() -> None:
    for manifest in everything():
        for pod in pods_of(manifest):
            is_head = pod["metadata"]["labels"].get("ray.io/node-type") == "head"
            assert pod["spec"].get("automountServiceAccountToken", True) is is_head


def test_every_path_that_ray_writes_is_a_volume() -> None:
    for manifest in everything():
        if manifest["kind"] not in KINDS:
            continue
        for pod in pods_of(manifest):
            if "ray.io/node-type" not in pod["metadata"]["labels"]:
                continue
            volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
            (container,) = pod["spec"]["containers"]
            mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
            assert set(mounted) == {"/tmp", "/dev/shm", "/models", "/etc/blip2"}
            assert mounted["/dev/shm"]["emptyDir"]["medium"] == "Memory"
            env = {variable["name"]: variable.get("value", "") for variable in container["env"]}
            for name in ("HF_HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
                assert env[name].startswith(("/models", "/tmp/"))


def test_secrets_are_named_and_never_written() -> None:
    for manifest in everything():
        assert manifest["kind"] != "Secret"
        for pod in pods_of(manifest):
            for container in pod["spec"]["containers"]:
                for variable in container.get("env", []):
                    if any(word in variable["name"] for word in ("TOKEN", "PASSWORD", "KEY")):
                        assert "secretKeyRef" in variable["valueFrom"] and "value" not in variable


def test_selectors_select_pods() -> None:
    """A selector that matches nothing protects and measures nothing, without an error."""
    pods = [pod["metadata"]["labels"].items() for manifest in everything() for pod in pods_of(manifest)]
    kinds = set()
    for manifest in everything():
        if manifest["kind"] in ("NetworkPolicy", "PodDisruptionBudget", "PodMonitor"):
            kinds.add(manifest["kind"])
            selector = manifest["spec"].get("podSelector") or manifest["spec"]["selector"]
            assert any(selector["matchLabels"].items() <= labels for labels in pods), manifest["metadata"]
    assert len(kinds) == 3


@pytest.mark.parametrize("combination", [each for each in COMBINATIONS if "monitoring" in each], ids=str)
def test_the_ports_that_are_scraped_are_named(combination: tuple[str, ...]) -> None:
    """Prometheus silently skips a port without a name: it used to scrape nothing of the autoscaler."""
    manifests = combine(*combination)
    pods = list(pods_of(of_kind(manifests, "RayCluster", "RayJob")))
    monitors = [manifest["spec"] for manifest in manifests if manifest["kind"] == "PodMonitor"]
    assert len(monitors) == 2
    for monitor in monitors:
        wanted = monitor["selector"]["matchLabels"].items()
        (selected, *_) = [pod["spec"] for pod in pods if wanted <= pod["metadata"]["labels"].items()]
        named = {port["name"] for each in selected["containers"] for port in each.get("ports", ())}
        assert {port["port"] for port in monitor["podMetricsEndpoints"]} <= named | {"metrics"}


def test_disruption_budgets_count_as_kubernetes_can() -> None:
    """Pods of a custom resource have no scale, so a budget by maxUnavailable or per cent is not computed."""
    budgets = [manifest for manifest in everything() if manifest["kind"] == "PodDisruptionBudget"]
    assert budgets
    for budget in budgets:
        assert isinstance(budget["spec"]["minAvailable"], int) and "maxUnavailable" not in budget["spec"]


def test_a_request_ends_before_its_replica_and_a_replica_before_its_pod() -> None:
    service = of_kind(build("endpoint"), "RayService")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    longest_s = ServeArgs.model_validate(application["args"]).root.longest_request_s
    assert longest_s < config["http_options"]["request_timeout_s"]
    for deployment in application["deployments"]:
        drain_s = deployment["graceful_shutdown_timeout_s"]
        assert longest_s < drain_s
        assert deployment["autoscaling_config"]["min_replicas"] >= 2
        for group in cluster_of(service)["workerGroupSpecs"]:
            pod = group["template"]["spec"]
            (hook,) = [container["lifecycle"]["preStop"] for container in pod["containers"]]
            assert "--deadline-remaining-seconds 150" in hook["exec"]["command"][-1]
            assert drain_s < 150 < pod["terminationGracePeriodSeconds"]
        assert drain_s < service["spec"]["rayClusterDeletionDelaySeconds"]


def test_kubernetes_serves_what_serve_config_says() -> None:
    committed = yaml.safe_load((ROOT / "deploy/serve_config.yaml").read_text())
    served = yaml.safe_load(of_kind(build("endpoint"), "RayService")["spec"]["serveConfigV2"])
    assert served == committed
    on_cpus = yaml.safe_load(of_kind(combine(*COMBINATIONS[2]), "RayService")["spec"]["serveConfigV2"])
    captioner = on_cpus["applications"][0]["deployments"][1]
    assert captioner["ray_actor_options"] == {"num_cpus": 8}
    captioner["ray_actor_options"] = committed["applications"][0]["deployments"][1]["ray_actor_options"]
    assert on_cpus == committed


def test_without_accelerators_the_job_says_so() -> None:
    job = of_kind(combine("rayjob", "cpu", "assemble"), "RayJob")
    assert "--device cpu" in job["spec"]["entrypoint"]
    assert [group["groupName"] for group in cluster_of(job)["workerGroupSpecs"]] == ["cpu"]


def test_kueue_gets_a_cluster_of_one_size() -> None:
    """Kueue refuses a job whose cluster has an autoscaler, and admits by the number of replicas."""
    for combination in COMBINATIONS[:2]:
        manifest = of_kind(combine(*combination), "RayCluster", "RayJob")
        assert manifest["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "blip2"}
        cluster = cluster_of(manifest)
        assert not cluster["enableInTreeAutoscaling"] and "autoscalerOptions" not in cluster
        for group in cluster["workerGroupSpecs"]:
            assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] > 0


def test_the_model_cache_replaces_the_volume_of_every_pod() -> None:
    manifests = combine(*COMBINATIONS[1])
    assert of_kind(manifests, "PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteMany"]
    pods = [
        pod for pod in pods_of(of_kind(manifests, "RayJob")) if "ray.io/group" in pod["metadata"]["labels"]
    ]
    assert len(pods) == 3
    for pod in pods:
        volume = {"name": "models", "persistentVolumeClaim": {"claimName": "blip2-models"}}
        assert volume in pod["spec"]["volumes"]


def test_a_job_sees_the_accelerators_that_may_be_started() -> None:
    """On Kubernetes the autoscaler's limits are those of the RayCluster."""
    (cluster,) = (manifest for manifest in build("cluster") if manifest["kind"] == "RayCluster")
    cluster = copy.deepcopy(cluster)
    cluster["metadata"].setdefault("namespace", "default")
    kinds = node_types_of(_derive_autoscaling_config_from_ray_cr(cluster))
    assert [kind.name for kind in kinds if kind.resources.get("GPU")] == ["accelerator"]
