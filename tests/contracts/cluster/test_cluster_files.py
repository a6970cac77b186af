"""The cluster files, as Ray's launcher and Serve read them."""

from __future__ import annotations

import dataclasses
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

from deploy.app import ServeArgs, build
from deploy.check import check, check_cluster, check_serve_config, main, placeholders
from deploy.settings import Settings

ROOT = Path(__file__).parents[3]


SERVICE = """
kind: RayService
metadata: {name: a}
spec:
  rayClusterConfig: {headGroupSpec: {template: {spec: {containers: [{name: ray}]}}}}
"""
"""A manifest that lacks only its Serve config."""


def load(path: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / path).read_text())


@pytest.fixture
def filled_in(tmp_path: Path) -> Path:
    """The committed `ray_cluster.yaml` with values for its placeholders."""
    path = tmp_path / "filled_in.yaml"
    path.write_text((ROOT / "ray_cluster.yaml").read_text().replace("YOUR_", "my"))
    return path


def test_the_committed_files_lack_only_values_of_the_user(
    filled_in: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main([]) == 1
    said = capsys.readouterr()
    assert "serve_config.yaml is valid" in said.out
    assert "ray_cluster.yaml: docker.image holds YOUR_REGISTRY, " in said.err
    assert main([str(filled_in)]) == 0
    found = {placeholder for _, placeholder in placeholders(load("ray_cluster.yaml"))}
    documented = (ROOT / "docs/deployment.md").read_text()
    assert found and all(f"`{placeholder}`" in documented for placeholder in found)


def test_before_an_update_its_models_are_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Serve would stop a working replica, and then find no model for its replacement."""
    config = tmp_path / "serve.yaml"

    def check_models(**arguments: object) -> tuple[int, str]:
        changed = load("deploy/serve_config.yaml")
        changed["applications"][0]["args"] |= arguments
        config.write_text(yaml.safe_dump(changed))
        return main(["--models", str(config)]), capsys.readouterr().err

    assert check_models(engine={"model": "demo"}) == (0, "")
    missing = str(tmp_path / "missing")
    status, said = check_models(engine={"model": missing})
    assert status == 1 and missing in said
    status, said = check_models(engine={"model": "demo"}, other_models=[f"second={missing}"])
    assert status == 1 and missing in said
    assert main([str(config)]) == 0, "without the flag, no model is looked for"


def test_elsewhere_the_packaged_serve_config_is_checked_and_the_missing_cluster_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Outside the clone it used to report "No such file or directory" for its own files."""
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    said = capsys.readouterr().out
    assert str(files("deploy") / "serve_config.yaml") in said
    assert "no cluster was checked: there is no ray_cluster.yaml in this folder" in said


def test_the_cluster_of_the_working_folder_and_named_files_are_checked(
    filled_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = load("ray_cluster.yaml") | {"max_worker": 3}
    (tmp_path / "ray_cluster.yaml").write_text(yaml.safe_dump(wrong))
    assert main([]) == 1
    assert "max_worker" in capsys.readouterr().err
    right = str(filled_in)
    assert main([right]) == 0
    assert main([right, "ray_cluster.yaml", "nothing.yaml"]) == 1
    said = capsys.readouterr().err
    assert said.count("error: ") == 2 and "nothing.yaml" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "the file must be YAML: while parsing"),
        ("kind: Kustomization\n", "must be built first: kubectl kustomize"),
        ("- 1\n", "the file must be a Serve config"),
        ("", "wrong.yaml: the file is empty; the command that wrote it may have failed"),
        ("applications: 5\n", "wrong.yaml: applications Input should be a valid list (got 5)"),
        ("kind: RayJob\nspec: [1]\n", "RayJob: a field has a value of the wrong type"),
        ("kind: RayService\nmetadata: {name: a}\n", "containers must hold at least one container"),
        (SERVICE + "  serveConfigV2: 'applications: ['\n", "spec.serveConfigV2 must be YAML: while parsing"),
        (SERVICE + "  serveConfigV2: 'words'\n", "should be a valid dictionary"),
        (SERVICE + "  serveConfigV2: {applications: []}\n", "spec.serveConfigV2 must be a text, got dict"),
        ("cluster_name: a\n", "the file: 'provider' is a required property"),
        ("cluster_name: a\nprovider: aws\n", "provider: 'aws' is not of type 'object'"),
        ("cluster_name: a\nprovider: {type: aws}\ndocker: 5\n", "docker: 5 is not of type 'object'"),
        ("cluster_name: a\nprovider: {type: none}\n", "Unsupported node provider: none"),
        ("cluster_name: a\nprovider: {type: local}\n", "Please supply a `head_ip`"),
        (None, "wrong.yaml: No such file or directory"),
    ],
)
def test_a_file_of_another_kind_is_one_line_and_no_traceback(
    text: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is not YAML, or that Ray reads before it checks the types, used to cause a traceback."""
    path = tmp_path / "wrong.yaml"
    if text is not None:
        path.write_text(text)
    assert main([str(path)]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and said in message


def test_the_folder_of_a_kustomization_must_be_built(tmp_path: Path, capsys: Any) -> None:
    """It was said to be a directory."""
    assert main([str(tmp_path)]) == 1
    assert "must be built first: kubectl kustomize FOLDER > FILE" in capsys.readouterr().err


def test_a_wrong_flag_of_the_check_exits_with_3(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--hlep"])
    assert end.value.code == 3
    assert "did you mean --help?" in capsys.readouterr().err


def test_the_cluster_grows_from_a_head_that_runs_no_tasks() -> None:
    cluster = load("ray_cluster.yaml")
    types = cluster["available_node_types"]
    assert cluster["head_node_type"] == "head" and types["head"]["resources"] == {"CPU": 0}
    assert types["accelerator"]["resources"]["GPU"] == 1
    assert all(kind.get("min_workers", 0) == 0 for kind in types.values())


def test_machines_on_demand_stand_in_for_spot_machines() -> None:
    """The autoscaler takes the higher priority while available; both kinds serve the same requests."""
    cluster = load("ray_cluster.yaml")
    types = cluster["available_node_types"]
    assert "--env RAY_enable_autoscaler_v2=1" in cluster["docker"]["run_options"], "v1 ignores priorities"
    for name in ("cpu", "accelerator"):
        spot, on_demand = types[name], types[f"{name}_on_demand"]
        assert spot["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
        assert spot.pop("priority") > on_demand.pop("priority")
        assert spot.pop("max_workers") > on_demand.pop("max_workers") > 0
        assert spot == on_demand


def test_every_machine_has_an_image_with_a_driver_and_a_profile() -> None:
    """Without an image, Ray uses its own of 2022, whose driver is too old for this torch."""
    for name, kind in load("ray_cluster.yaml")["available_node_types"].items():
        assert kind["node_config"]["ImageId"] == "YOUR_MACHINE_IMAGE", name
        assert kind["node_config"]["IamInstanceProfile"]["Name"].startswith("YOUR_"), name


def test_nodes_run_the_image_and_install_nothing() -> None:
    cluster = load("ray_cluster.yaml")
    assert not any(key.endswith("setup_commands") for key in cluster)
    assert cluster["docker"]["image"].endswith("-cpu")
    for name, kind in cluster["available_node_types"].items():
        worker_image = kind.get("docker", {}).get("worker_image", cluster["docker"]["image"])
        assert worker_image.endswith("-cuda") is name.startswith("accelerator")
    assert "--env RAY_USAGE_STATS_ENABLED=0" in cluster["docker"]["run_options"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.update(max_worker=3), "max_worker"),
        (lambda c: c.update(setup_commands="pip"), "^setup_commands: 'pip' is not of type"),
        (lambda c: c["available_node_types"]["cpu"].update(min_workers=100), "max_workers"),
        (lambda c: c.update(head_node_type="heads"), "head_node_type"),
        (lambda c: c["available_node_types"]["accelerator"]["resources"].update(GPU=0.5), "GPU"),
    ],
)
def test_a_wrong_cluster_is_refused_by_name(change: Any, named: str) -> None:
    cluster = load("ray_cluster.yaml")
    change(cluster)
    with pytest.raises(ValueError, match=named):
        check_cluster(cluster)


@pytest.mark.parametrize("dropped", [{"min_workers": 0}, {"head_node": {}, "worker_nodes": {}}])
def test_a_cluster_with_fields_that_ray_drops_is_taken(dropped: dict[str, Any]) -> None:
    check_cluster(load("ray_cluster.yaml") | dropped)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.update(http_option={}), "http_option"),
        (lambda c: c["http_options"].update(prot=1), "http_options.prot"),
        (lambda c: c["applications"][0].update(runtime={}), r"applications\[0\].runtime"),
        (
            lambda c: c["applications"][0]["deployments"][0].update(max_ongoing=9),
            r"deployments\[0\].max_ongoing",
        ),
        (
            lambda c: c["applications"][0]["deployments"][1]["autoscaling_config"].update(max_replica=2),
            r"autoscaling_config.max_replica",
        ),
        (lambda c: c["applications"][0]["deployments"][1]["ray_actor_options"].update(num_gpu=1), "num_gpu"),
        (lambda c: c["applications"][0]["deployments"][1].update(name="Captoiner"), "Captoiner"),
        (
            lambda c: c["applications"][0]["args"].update(timeout=3),
            r"timeout Un.* \(got 3\); did you mean timeout_s\?$",
        ),
        (lambda c: c["applications"][0]["args"]["engine"].update(modle="x"), "modle"),
        (lambda c: c["applications"][0]["args"]["options"].update(num_beams=0), "py: options num_beams must"),
    ],
)
def test_a_key_that_serve_would_ignore_is_refused_by_name(change: Any, named: str) -> None:
    config = load("deploy/serve_config.yaml")
    change(config)
    with pytest.raises(ValueError, match=named):
        check_serve_config(config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["http_options"].update(request_timeout_s=119), "request_timeout_s must be at least 120"),
        (lambda c: c["applications"][0]["args"].update(timeout_s=600), "must be at least 660, .*, got 130"),
        (
            lambda c: c["applications"][0]["deployments"][1].update(graceful_shutdown_timeout_s=20),
            "graceful_shutdown_timeout_s of Captioner must be at least 120, .*, got 20",
        ),
    ],
)
def test_clocks_that_contradict_each_other_are_refused(change: Any, said: str) -> None:
    """Serve would end a request, or its replica, earlier than the endpoint's own time limit."""
    config = load("deploy/serve_config.yaml")
    change(config)
    with pytest.raises(ValueError, match=said):
        check_serve_config(config)
    config = load("deploy/serve_config.yaml")
    config["http_options"]["request_timeout_s"] = None
    gateway, captioner = config["applications"][0]["deployments"]
    del gateway["graceful_shutdown_timeout_s"]
    captioner["graceful_shutdown_timeout_s"] = "140"  # Serve accepts this
    check_serve_config(config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"min_replicas": 9}, r"autoscaling_config of Gateway must be .*max_replicas \(8\) must be"),
        ({"max_replicas": "8x"}, r"autoscaling_config of Gateway must be .*: max_replicas Input should be"),
    ],
    ids=str,
)
def test_a_scale_that_serve_refuses_while_it_deploys_is_refused(change: Any, said: str) -> None:
    config = load("deploy/serve_config.yaml")
    gateway = config["applications"][0]["deployments"][0]
    gateway["autoscaling_config"] |= change
    with pytest.raises(ValueError, match=said):
        check_serve_config(config)
    gateway |= {"num_replicas": "auto", "autoscaling_config": {"min_replicas": 9}}
    check_serve_config(config)


def test_another_application_is_refused() -> None:
    """Only Serve on the cluster used to find that no deployment has this name."""
    config = load("deploy/serve_config.yaml")
    config["applications"][0]["import_path"] = "deploy.app:biuld"
    with pytest.raises(ValueError, match=r"import_path must be deploy\.app:build, got deploy\.app:biuld"):
        check_serve_config(config)


def test_serve_itself_checks_the_args_of_the_builder() -> None:
    # With postponed annotations, Serve does not see the model and passes `build` an unchecked dictionary.
    with pytest.raises(ValueError, match="modle"):
        call_user_app_builder_with_args_if_necessary(build, {"engine": {"modle": "demo"}})
    call_user_app_builder_with_args_if_necessary(build, {"engine": {"model": "demo"}, "keys_file": "k"})


def test_a_cluster_without_keys_is_refused_unless_anybody_may_ask() -> None:
    config = load("deploy/serve_config.yaml")
    args = config["applications"][0]["args"]
    del args["keys_file"]
    for refuse in (lambda: check_serve_config(config), lambda: build(ServeArgs(Settings()))):
        with pytest.raises(ValueError, match="keys_file must be given"):
            refuse()
    args["allow_anonymous"] = True
    check_serve_config(config)


def test_a_former_name_is_still_read() -> None:
    """Flags and stored runs accept it, but the args of a Serve config used to refuse it."""
    config = load("deploy/serve_config.yaml")
    config["applications"][0]["args"]["engine"]["skip_canary"] = True
    check_serve_config(config)
    args = ServeArgs.model_validate(config["applications"][0]["args"])
    assert args.root.engine.skip_self_test


def test_an_image_that_names_one_limit_keeps_the_others_of_the_endpoint() -> None:
    """The other limits used to become those of the batch job: 128 MiB a file, and 120 s instead of 30 s."""
    image = ServeArgs.model_validate({"image": {"max_pixels": 99}}).root.image
    assert image == dataclasses.replace(Settings().image, max_pixels=99)


def test_a_file_of_neither_kind_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("a: 1\n")
    with pytest.raises(ValueError, match="applications"):
        check(other)


def test_a_placeholder_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`kubectl apply` accepts a placeholder, and then nothing starts."""
    account = {"kind": "ServiceAccount", "metadata": {"name": "a", "annotations": {"role": "YOUR_ROLE"}}}
    manifests = tmp_path / "manifests.yaml"
    manifests.write_text(yaml.safe_dump_all([{"kind": "ConfigMap", "metadata": {"name": "b"}}, account]))
    assert main([str(manifests)]) == 1
    said = capsys.readouterr().err
    assert "metadata.annotations.role holds YOUR_ROLE; write your own values there" in said


def test_the_serve_config_in_a_manifest_is_checked(tmp_path: Path) -> None:
    service = {"kind": "RayService", "metadata": {"name": "s"}, "spec": {"serveConfigV2": "http_option: {}"}}
    manifests = tmp_path / "manifests.yaml"
    manifests.write_text(yaml.safe_dump(service))
    with pytest.raises(ValueError, match="containers must hold"):
        check(manifests)
    group = {"template": {"spec": {"containers": [{"name": "ray"}]}}}
    service["spec"] = {"serveConfigV2": "http_option: {}", "rayClusterConfig": {"headGroupSpec": group}}
    manifests.write_text(yaml.safe_dump(service))
    with pytest.raises(ValueError, match="http_option"):
        check(manifests)
