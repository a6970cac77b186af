"""Write what a cluster needs, from the installed package to a folder.

In a source tree these files are at hand; an installed wheel carries them: the cluster of `ray up`, the Serve
configuration, the Kubernetes manifests, and the exact versions. Only `ray_cluster.yaml` differs from the one
in the source tree: its nodes install the wheel from the folder instead of the source.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from blip2_actor import __version__

FROM_SOURCE = "-e '.[ray]'"
SERVE_CONFIG = Path("kubernetes/rayservice/serve_config.yaml")
"""Kustomize reads files below its own folders alone; `serve_config.yaml` is a link to this one."""
FROM_WHEEL = f"--find-links . 'blip2-ray[ray]=={__version__}'"


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
    }
    found |= dict(_files_below(deploy / "kubernetes", "kubernetes"))
    texts = {name: file.read_text(encoding="utf-8") for name, file in found.items()}
    texts["ray_cluster.yaml"] = _installing_the_wheel(texts["ray_cluster.yaml"])
    return texts


def _files_below(folder: Traversable, name: str) -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files_below(entry, f"{name}/{entry.name}")
        else:
            yield f"{name}/{entry.name}", entry


def _installing_the_wheel(cluster: str) -> str:
    if cluster.count(FROM_SOURCE) != 1:
        raise ValueError(f"ray_cluster.yaml must install the project with {FROM_SOURCE} exactly once")
    return cluster.replace(FROM_SOURCE, FROM_WHEEL)
