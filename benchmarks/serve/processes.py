"""What the processes of an application use: CPU time by part, and memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise

import psutil

PARTS = {"proxy": "ProxyActor", "gateway": ":Gateway", "model": ":Captioner", "serve_batch": ":ServeBatch"}
"""The processes of an application, with words from the title that Ray gives them."""
DECODERS = "decoders"
"""The children of the gateway."""


def cpu_s_by_part(root: psutil.Process) -> dict[str, float]:
    """Return the CPU seconds that each part of the running application has used so far.

    Args:
        root: the process that has started Ray.
    """
    used = dict.fromkeys([*PARTS, DECODERS], 0.0)
    for process in root.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            title = _title(process)
            part = next((part for part, words in PARTS.items() if words in title), None)
            if part is None:
                continue
            used[part] += cpu_s(process)
            if part == "gateway":
                used[DECODERS] += sum(map(cpu_s, process.children(recursive=True)))
    return used


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def cpu_s_by_name(root: psutil.Process) -> dict[str, float]:
    """Return the CPU seconds of a process and all its descendants so far, by name and process id."""
    return {name: cpu_s(process) for name, process in _family(root)}


def pss_bytes_by_name(root: psutil.Process) -> dict[str, int]:
    """Return the memory of a process and all its descendants, by name and process id.

    A page that several processes share counts once, in equal parts.
    """
    return {name: process.memory_full_info().pss for name, process in _family(root)}


def _family(root: psutil.Process) -> Iterator[tuple[str, psutil.Process]]:
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            yield f"{_name(_title(process), process)} {process.pid}", process


def _title(process: psutil.Process) -> str:
    return " ".join(process.cmdline())


def _name(title: str, process: psutil.Process) -> str:
    """Return a short name: Ray's own of an actor, else the script or the module that a Python runs."""
    if title.startswith("ray::"):
        return title.partition("(")[0].strip()
    words = title.split()
    scripts = [word.rpartition("/")[2] for word in words if word.endswith(".py")]
    modules = [after for word, after in pairwise(words) if word == "-m"]
    return next(iter([*scripts, *modules]), process.name())
