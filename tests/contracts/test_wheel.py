"""The wheel: its files, its metadata, and that it works without the source tree."""

from __future__ import annotations

import email
import email.message
import zipfile
from pathlib import Path

import pytest

import blip2_actor
from tests.contracts.installed_wheel import build_wheel, install_wheel, run_installed
from tests.contracts.source_tree import PACKAGES, ROOT, modules


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def test_every_module_is_in_it_and_nothing_else_is(names):
    assert {name for name in names if name.endswith(".py")} == {module.path for module in modules(*PACKAGES)}
    assert {name.split("/")[0] for name in names} == {
        *PACKAGES,
        f"blip2_ray-{blip2_actor.__version__}.dist-info",
    }


def test_it_holds_what_the_modules_read_at_run_time(names):
    checkpoint = ROOT / "blip2_actor/demo/checkpoint"
    expected = {file.relative_to(ROOT).as_posix() for file in checkpoint.iterdir()}
    expected |= {f"{package}/py.typed" for package in PACKAGES}
    templates = ROOT / "pipeline/page/templates"
    expected |= {file.relative_to(ROOT).as_posix() for file in templates.iterdir()}
    expected |= {f"deploy/http/{name}" for name in ("page.html", "page.css", "page.js", "docs.html")}
    expected |= {"deploy/serve_config.yaml"}
    expected |= {"deploy/Dockerfile", "deploy/constraints-cuda.txt"}
    assert expected <= names


def test_it_holds_what_a_cluster_needs(wheel, names):
    files = [file for file in (ROOT / "deploy/kubernetes").rglob("*") if file.is_file()]
    manifests = {file.relative_to(ROOT).as_posix() for file in files}
    assert manifests and manifests <= names
    with zipfile.ZipFile(wheel) as archive:
        for name in ("ray_cluster.yaml", "constraints.txt"):
            assert archive.read(f"deploy/cluster_files/{name}") == (ROOT / name).read_bytes()


def test_it_says_version_license_and_extras(metadata):
    assert metadata["Version"] == blip2_actor.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    extras = set(metadata.get_all("Provides-Extra", []))
    assert extras == {"batch", "serve", "s3", "gcs", "heic", "otel", "all", "ray", "dev"}
    core = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert not any(line.startswith(("ray", "pyarrow", "fastapi")) for line in core)


def test_the_license_is_in_it(wheel, names):
    (name,) = [name for name in names if name.endswith("LICENSE")]
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(name) == (ROOT / "LICENSE").read_bytes()


def test_it_runs_without_the_source_tree(wheel, tmp_path):
    """The command, its data files and the engine work; `make wheel` runs the whole demonstration."""
    programs = install_wheel(wheel, tmp_path / "env")
    empty = tmp_path / "empty"
    empty.mkdir()
    helped = run_installed(programs / "blip2", "caption", "--help", cwd=empty)
    assert helped.returncode == 0 and "--max-failed-fraction" in helped.stdout, helped.stderr
    code = f"""
import numpy as np, blip2_actor, pipeline, deploy
from importlib.metadata import version
for package in (blip2_actor, pipeline, deploy):
    assert package.__file__.startswith({str(tmp_path)!r}), package.__file__
assert version("blip2-ray") == blip2_actor.__version__
with blip2_actor.EngineConfig(model="demo", device="cpu", num_threads=1).build() as engine:
    result = engine.generate([blip2_actor.Request(image=np.zeros((64, 64, 3), np.uint8))])[0]
assert result.status == "ok", result
from deploy.cluster_files.__main__ import main
assert main(["cluster"]) == 0
"""
    done = run_installed(programs / "python", "-c", code, cwd=empty)
    assert done.returncode == 0, done.stderr
    assert (empty / "cluster" / "kubernetes" / "overlays" / "job" / "kustomization.yaml").exists()
