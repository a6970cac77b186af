"""The cluster files as their readers see them: Ray's launcher and Serve."""

from __future__ import annotations

import dataclasses
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

from deploy.app import ServeArgs, build
from deploy.check import check, check_cluster, check_serve_config, main
from deploy.settings import Settings
from tests.contracts.installed_wheel import SOURCES

ROOT = Path(__file__).parents[3]


def load(path: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / path).read_text())


def test_the_committed_files_are_valid(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main([]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "serve_config.yaml is valid" in said and "ray_cluster.yaml is valid" in said


def test_elsewhere_the_packaged_serve_config_is_checked_and_the_missing_cluster_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Outside the clone it said "No such file or directory" for its own files."""
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    said = capsys.readouterr().out
    assert str(files("deploy") / "serve_config.yaml") in said
    assert "no cluster was checked: there is no ray_cluster.yaml in this folder" in said


def test_the_cluster_of_the_working_folder_and_named_files_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = load("ray_cluster.yaml") | {"max_worker": 3}
    (tmp_path / "ray_cluster.yaml").write_text(yaml.safe_dump(wrong))
    assert main([]) == 1
    assert "max_worker" in capsys.readouterr().err
    right = str(ROOT / "ray_cluster.yaml")
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
        (None, "wrong.yaml: No such file or directory\n"),
    ],
)
def test_a_file_of_another_kind_is_one_line_and_no_traceback(
    text: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is no YAML was a traceback."""
    path = tmp_path / "wrong.yaml"
    if text is not None:
        path.write_text(text)
    assert main([str(path)]) == 1
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1


def test_a_wrong_flag_of_the_check_exits_with_3(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--hlep"])
    assert end.value.code == 3
    assert "did you mean --help?" in capsys.readouterr().err


def test_the_cluster_grows_from_a_head_that_runs_no_tasks() -> None:
    cluster = load("ray_cluster.yaml")
    types = cluster["available_node_types"]
    assert set(types) == {"head", "cpu", "accelerator"} and cluster["head_node_type"] == "head"
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["accelerator"]["min_workers"] == 0 and types["accelerator"]["resources"]["GPU"] == 1
    assert [types[name]["labels"]["pool"] for name in types] == list(types)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.update(max_worker=3), "max_worker"),
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
        (lambda c: c["applications"][0]["args"].update(timeout=3), "timeout"),
        (lambda c: c["applications"][0]["args"]["engine"].update(modle="x"), "modle"),
        (lambda c: c["applications"][0]["args"]["options"].update(num_beams=0), "num_beams"),
    ],
)
def test_a_key_that_serve_would_ignore_is_refused_by_name(change: Any, named: str) -> None:
    config = load("deploy/serve_config.yaml")
    change(config)
    with pytest.raises(ValueError, match=named):
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
    """Flags and stored runs read it; the args of a Serve config refused it."""
    config = load("deploy/serve_config.yaml")
    config["applications"][0]["args"]["engine"]["skip_canary"] = True
    check_serve_config(config)
    args = ServeArgs.model_validate(config["applications"][0]["args"])
    assert args.root.engine.skip_self_test


def test_an_image_that_names_one_limit_keeps_the_others_of_the_endpoint() -> None:
    """It took the other limits of the batch job: 128 MiB a file, and 120 s instead of 30 s."""
    image = ServeArgs.model_validate({"image": {"max_pixels": 99}}).root.image
    assert image == dataclasses.replace(Settings().image, max_pixels=99)


def test_a_file_of_neither_kind_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("a: 1\n")
    with pytest.raises(ValueError, match="applications"):
        check(other)


def test_every_file_names_the_pinned_ray() -> None:
    [version] = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    docker = load("ray_cluster.yaml")
    images = [
        docker["docker"]["image"],
        docker["available_node_types"]["accelerator"]["docker"]["worker_image"],
        *re.findall(r"^FROM (\S+)", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE),
    ]
    assert all(image.startswith(f"rayproject/ray:{version}-py311") for image in images)
    assert load("deploy/kubernetes/base/ray_cluster.yaml")["spec"]["rayVersion"] == version


def test_the_image_holds_all_that_its_installation_reads() -> None:
    """The first stage copies what the wheel is built from; the second installs the wheel with constraints."""
    _, build, image = (ROOT / "deploy/Dockerfile").read_text().split("\nFROM ")
    for name in SOURCES:
        assert re.search(rf"^COPY .*\b{re.escape(name)}\b", build, re.MULTILINE), name
    (constraints,) = re.findall(r"pip install .*-c (\S+)", image)
    assert re.search(r"^COPY .*\bconstraints\.txt ", image, re.MULTILINE) and constraints.endswith(
        "constraints.txt"
    )
    assert "-e" not in image.split() and ".whl" in image


def test_a_placeholder_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`kubectl apply` takes it, and nothing starts."""
    account = {"kind": "ServiceAccount", "metadata": {"name": "a", "annotations": {"role": "YOUR_ROLE"}}}
    manifests = tmp_path / "manifests.yaml"
    manifests.write_text(yaml.safe_dump_all([{"kind": "ConfigMap", "metadata": {"name": "b"}}, account]))
    assert main([str(manifests)]) == 1
    said = capsys.readouterr().err
    assert "metadata.annotations.role holds YOUR_ROLE; write your own value there" in said


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
