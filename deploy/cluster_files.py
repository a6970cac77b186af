"""`python -m deploy.cluster_files FOLDER`: write what a cluster needs, from the installed package.

In a source tree these files are at hand; an installed wheel carries them, and this command writes them where
they can be edited: the cluster of `ray up`, the Serve configuration, the Kubernetes manifests, and the exact
versions. Only `ray_cluster.yaml` differs from the one in the source tree: its nodes install the wheel from
the folder instead of the source.
"""

from __future__ import annotations

import argparse
import sys
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from blip2_actor import __version__

FILES = ("ray_cluster.yaml", "serve_config.yaml", "constraints.txt")
MANIFESTS = "kubernetes"
FROM_SOURCE = "-e '.[ray]'"
FROM_WHEEL = f"--find-links . 'blip2-ray[ray]=={__version__}'"


def write_cluster_files(folder: Path) -> list[Path]:
    """Write the files to a folder, which is made if needed, and return their paths.

    Raises:
        FileExistsError: one of them is there already; nothing is written.
    """
    content = dict(_content(files("deploy")))
    there = [name for name in content if (folder / name).exists()]
    if there:
        raise FileExistsError(f"{folder / there[0]} exists; name another folder or delete it")
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in content]


def _content(package: Traversable) -> list[tuple[str, str]]:
    found = [(name, package.joinpath(name).read_text(encoding="utf-8")) for name in FILES]
    manifests = sorted(package.joinpath(MANIFESTS).iterdir(), key=lambda file: file.name)
    found += [(f"{MANIFESTS}/{file.name}", file.read_text(encoding="utf-8")) for file in manifests]
    return [(name, _installing_the_wheel(text) if name == FILES[0] else text) for name, text in found]


def _installing_the_wheel(cluster: str) -> str:
    if cluster.count(FROM_SOURCE) != 1:
        raise ValueError(f"{FILES[0]} must install the project with {FROM_SOURCE} exactly once")
    return cluster.replace(FROM_SOURCE, FROM_WHEEL)


def main(argv: list[str] | None = None) -> int:
    """Write the files; 0 when done, 1 when the folder holds one of them already."""
    parser = argparse.ArgumentParser(
        prog="python -m deploy.cluster_files",
        description="Write the files of a cluster: ray_cluster.yaml, serve_config.yaml, manifests.",
    )
    parser.add_argument("folder", type=Path, help="where to write them; made if needed")
    folder = parser.parse_args(argv).folder
    try:
        written = write_cluster_files(folder)
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write("".join(f"{path}\n" for path in written))
    sys.stdout.write(f"copy the wheel to {folder}/ before ray up: each node installs it from there\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
