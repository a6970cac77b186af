"""What an attempt runs on: the command line, versions and hardware."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from blip2_actor import __version__
from pipeline.placement.cluster import Cluster
from pipeline.storage.secrets import hide_secrets

PACKAGES = ("torch", "transformers", "ray", "pyarrow", "pillow")
MAX_COMMAND_CHARS = 2_000
ACCELERATOR = "accelerator_type:"
"""Ray names the type of a node's accelerator by a resource with this prefix."""


def command_line() -> str:
    """Return the command line of this process, without the secrets of URIs."""
    program, *arguments = sys.argv
    words = ["blip2" if Path(program).name in ("blip2", "__main__.py") else program, *arguments]
    return shlex.join(map(hide_secrets, words))[:MAX_COMMAND_CHARS]


def versions() -> dict[str, str]:
    found = {"blip2-ray": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware_of(cluster: Cluster) -> dict[str, Any]:
    """Describe the machines of a cluster, and the processor of this one."""
    resources = {name for node in cluster.nodes for name in node.resources}
    return {
        "nodes": len(cluster.nodes),
        "cpus": cluster.total("CPU"),
        "accelerators": cluster.total("GPU"),
        "accelerator_types": sorted(n.removeprefix(ACCELERATOR) for n in resources if ACCELERATOR in n),
        "memory_gib": round(cluster.total("memory") / 2**30, 1),
        "driver": f"{platform.system()} {platform.machine()}, {_processor()}, {os.cpu_count()} cores",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown processor"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown processor"
