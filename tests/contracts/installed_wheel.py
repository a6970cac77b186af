"""A wheel in a fresh environment: built, installed without the source tree, and run from an empty folder.

    python -m tests.contracts.installed_wheel dist/*.whl

installs a wheel and runs `blip2 demo` and `blip2 report` with it, as `make wheel` does. The environment
borrows the packages of the running one, so that nothing is downloaded; the project itself comes from
the wheel alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from tests.contracts.source_tree import PACKAGES, ROOT

SOURCES = (*PACKAGES, "pyproject.toml", "README.md", "LICENSE", "constraints.txt", "ray_cluster.yaml")


def build_wheel(folder: Path) -> Path:
    """Build the wheel of the source tree in a folder, from a copy, so that the tree stays clean."""
    tree = folder / "tree"
    tree.mkdir(parents=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, tree / name)
    _pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(tree))
    (wheel,) = folder.glob("*.whl")
    return wheel


def install_wheel(wheel: Path, folder: Path) -> Path:
    """Make an environment in a folder, install the wheel, and return its folder of programs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    # A line with a path: packages there can be imported, but the .pth files there, among them that of an
    # editable installation of this project, are not read.
    (site / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    python = folder / "bin" / "python"
    _pip("--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    return folder / "bin"


def run_installed(program: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a program of the environment without access to the source tree."""
    keep = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    return subprocess.run(
        [str(program), *arguments],
        cwd=cwd,
        env=keep,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pip {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")


def main(argv: list[str]) -> int:
    """Install a wheel, run its demonstration and the report in an empty folder; return the exit status."""
    with tempfile.TemporaryDirectory() as path:
        programs = install_wheel(Path(argv[0]).resolve(), Path(path) / "env")
        empty = Path(path) / "empty"
        empty.mkdir()
        done = run_installed(programs / "blip2", "demo", "--num-images", "200", cwd=empty)
        report = ("report", "--output", "demo_output/captions", "--html", "report.html")
        page = run_installed(programs / "blip2", *report, cwd=empty)
    sys.stdout.write(done.stdout + done.stderr + page.stdout + page.stderr)
    return done.returncode or page.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
