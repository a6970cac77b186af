"""Write what a cluster needs, from the installed package to a folder.

In a source tree these files are at hand; an installed wheel carries them: the cluster of `ray up`, the Serve
configuration, the Kubernetes manifests, the Dockerfile and the exact versions.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

SERVE_CONFIG = Path("kubernetes/rayservice/serve_config.yaml")
"""Kustomize reads files below its own folders alone; `serve_config.yaml` is a link to this one."""


def write_cluster_files(folder: Path) -> list[Path]:
    """Write the files to a folder, which is made if needed, and return their paths.

    Raises:
        ValueError: one of them is there already; nothing is written.
        OSError: the folder cannot be made or written.
    """
    texts = _texts()
    there = [name for name in (*texts, SERVE_CONFIG.name) if (folder / name).exists()]
    if there:
        raise ValueError(f"{folder / there[0]} exists; name another folder, or delete the file")
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / SERVE_CONFIG.name).symlink_to(SERVE_CONFIG)
    return [folder / name for name in (*texts, SERVE_CONFIG.name)]


def _texts() -> dict[str, str]:
    """The content of each file, by its name in the folder."""
    deploy, here = files("deploy"), files("deploy.cluster_files")
    found = {
        "ray_cluster.yaml": here / "ray_cluster.yaml",
        "constraints.txt": here / "constraints.txt",
        "constraints-cuda.txt": deploy / "constraints-cuda.txt",
        "Dockerfile": deploy / "Dockerfile",
    }
    found |= dict(_files_below(deploy / "kubernetes", "kubernetes"))
    return {name: file.read_text(encoding="utf-8") for name, file in found.items()}


def _files_below(folder: Traversable, name: str) -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files_below(entry, f"{name}/{entry.name}")
        else:
            yield f"{name}/{entry.name}", entry
