"""A user's own `pipeline.py`, `deploy/` or `blip2_actor.py` must not be imported instead of ours.

`blip2` starts as its console script does: without the working folder in the import path.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CONSOLE_SCRIPT = "from pipeline.__main__ import run; run()"
POISON = "raise SystemExit('the file of the user was imported')\n"


def hide(folder: Path, name: str, as_package: bool) -> Path:
    """Write a module or a package that ends the interpreter when it is imported."""
    path = folder / name / "__init__.py" if as_package else folder / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(POISON)
    if as_package:
        (path.parent / "__main__.py").write_text(POISON)
    return path


def run(
    folder: Path, command: list[str], *arguments: str, python_path: str = str(ROOT)
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": python_path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("as_package", [False, True])
@pytest.mark.parametrize("command", [["-m", "pipeline"], ["-P", "-c", CONSOLE_SCRIPT]])
def test_serve_starts_our_deployment(tmp_path: Path, command: list[str], as_package: bool) -> None:
    """`python -m deploy` imports the first `deploy` in the path, which begins with the working folder."""
    hide(tmp_path, "deploy", as_package)
    done = run(tmp_path, command, "serve", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: blip2 serve")


def test_serve_starts_our_deployment_when_pythonpath_has_another(tmp_path: Path) -> None:
    hide(tmp_path / "libraries", "deploy", as_package=False)
    path = os.pathsep.join([str(tmp_path / "libraries"), str(ROOT)])
    done = run(tmp_path, ["-P", "-c", CONSOLE_SCRIPT], "serve", "--help", python_path=path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["pipeline", "blip2_actor", "deploy"])
def test_the_console_script_ignores_the_working_folder(tmp_path: Path, name: str) -> None:
    hide(tmp_path, name, as_package=False)
    done = run(tmp_path, ["-P", "-c", CONSOLE_SCRIPT], "caption", "--help")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("as_package", [False, True])
@pytest.mark.parametrize("package", ["pipeline", "deploy"])
def test_a_file_that_hides_our_engine_is_named(tmp_path: Path, package: str, as_package: bool) -> None:
    """The message used to be "No module named 'blip2_actor.flags'; 'blip2_actor' is not a package"."""
    hiding = hide(tmp_path, "blip2_actor", as_package)
    done = run(tmp_path, ["-m", package], "--help")
    assert done.returncode == 3
    assert f"{hiding} is imported in place of the package blip2_actor" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_file_on_pythonpath_that_hides_our_engine_is_named(tmp_path: Path) -> None:
    hiding = hide(tmp_path / "libraries", "blip2_actor", as_package=False)
    path = os.pathsep.join([str(tmp_path / "libraries"), str(ROOT)])
    done = run(tmp_path, ["-P", "-c", CONSOLE_SCRIPT], "--help", python_path=path)
    assert done.returncode == 3
    assert str(hiding) in done.stderr
