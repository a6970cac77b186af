"""The resources of an application's processes: CPU time by part, and memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

import psutil

T = TypeVar("T")
PARTS = {"proxy": "ProxyActor", "gateway": ":Gateway", "model": ":Captioner", "serve_batch": ":ServeBatch"}
"""The parts of an application, each with a text in the titles that Ray gives its processes."""
DECODERS = "decoders"
"""The part that consists of the gateway's child processes."""


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
    return {f"{name} {pid}": used_s for pid, (name, used_s) in of_family(root, cpu_s).items()}


def pss_bytes_by_name(root: psutil.Process) -> dict[str, int]:
    """Return the memory of a process and all its descendants, by name and process id.

    A page that several processes share counts once, in equal parts.
    """
    found = of_family(root, lambda process: process.memory_full_info().pss)
    return {f"{name} {pid}": size for pid, (name, size) in found.items()}


def of_family(root: psutil.Process, figure: Callable[[psutil.Process], T]) -> dict[int, tuple[str, T]]:
    """Return the name and a figure of a process and all its descendants, by process id."""
    found = {}
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
            found[process.pid] = _name(process), figure(process)
    return found


def _title(process: psutil.Process) -> str:
    return " ".join(process.cmdline())


def _name(process: psutil.Process) -> str:
    """Return a short name: Ray's title of an actor, or the script or module that a Python process runs."""
    title = _title(process)
    if title.startswith("ray::"):
        return title.partition("(")[0].strip()
    words = title.split()
    scripts = [word.rpartition("/")[2] for word in words if word.endswith(".py")]
    modules = [after for word, after in pairwise(words) if word == "-m"]
    return next(iter([*scripts, *modules]), process.name())
