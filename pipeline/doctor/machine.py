"""Checks of this machine: Python, memory, shared memory, open files, disks."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from blip2_actor import free_bytes
from blip2_actor.installation import ray_folder
from pipeline.finding import GIB, Finding, gib

SHARED_MEMORY = Path("/dev/shm")
MIN_FREE_BYTES, ENOUGH_FREE_BYTES = 1 * GIB, 4 * GIB
"""A worker of Ray takes about 0.3 GiB, and a run has several."""
ENOUGH_SHARED_BYTES = 2 * GIB
"""Ray puts its object store on a disk instead, when there is less."""
ENOUGH_OPEN_FILES = 4096
"""Each process of Ray has connections to most others."""
ENOUGH_TEMPORARY_BYTES = 5 * GIB
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def check_python() -> Finding:
    found = f"{platform.python_version()} ({sys.executable}) on {platform.system()} {platform.machine()}"
    if platform.system() != "Linux":
        return Finding(
            "Python", "warn", found, "run on Linux: elsewhere images are decoded without a sandbox"
        )
    return Finding("Python", "ok", found)


def check_memory() -> Finding:
    """Check what the machine and the limit of its container leave."""
    free = free_bytes(torch.device("cpu"))
    limit = container_limit()
    found = f"{gib(free)} free of {gib(psutil.virtual_memory().total)}"
    found += "" if limit is None else f", the container may use {gib(limit)}"
    if free < MIN_FREE_BYTES:
        return Finding("memory", "fail", found, "end other programs, or give the container more memory")
    if free < ENOUGH_FREE_BYTES:
        remedy = "free more than 4 GiB, or lower --max-actors and --max-decode-actors"
        return Finding("memory", "warn", found, remedy)
    return Finding("memory", "ok", found)


def container_limit() -> int | None:
    """Return the memory limit of the control group in bytes, or None if there is none."""
    for path in CGROUP_LIMITS:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() and int(text) < psutil.virtual_memory().total else None
    return None


def check_shared_memory() -> Finding:
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return Finding("shared memory", "warn", f"{SHARED_MEMORY} is missing", "mount a tmpfs there, for Ray")
    if free < ENOUGH_SHARED_BYTES:
        remedy = "start the container with --shm-size=4g; Ray otherwise keeps its objects on a slow disk"
        return Finding("shared memory", "warn", f"{gib(free)} free in {SHARED_MEMORY}", remedy)
    return Finding("shared memory", "ok", f"{gib(free)} free in {SHARED_MEMORY}")


def check_open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < ENOUGH_OPEN_FILES:
        found = f"a process may open {soft:,} files"
        raised = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
        remedy = f"run ulimit -n {raised} in the shell of the run"
        if raised < ENOUGH_OPEN_FILES:  # a shell may not raise it
            remedy = "raise the hard limit: nofile in limits.conf, LimitNOFILE of systemd, --ulimit of docker"
        return Finding("open files", "warn", found, remedy)
    found = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,} per process"
    return Finding("open files", "ok", found)


def check_disk(subject: str, folder: Path, enough_bytes: int, variable: str) -> Finding:
    """Check that a folder can be written, or made, and the free space of its disk.

    Args:
        variable: the environment variable that names another folder.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        remedy = f"set {variable} to a folder that can be written, or give the missing permission"
        return Finding(subject, "fail", f"{folder} cannot be written", remedy)
    free = shutil.disk_usage(existing).free
    if free < enough_bytes:
        remedy = f"free at least {gib(enough_bytes)} on the disk of {folder}"
        return Finding(subject, "warn", f"{gib(free)} free for {folder}", remedy)
    return Finding(subject, "ok", f"{gib(free)} free for {folder}")


def check_temporary_disk() -> Finding:
    """Check the folder of Ray and, if it is another one, that of Python's temporary files."""
    folders = {ray_folder().parent: "RAY_TMPDIR"}
    with suppress(FileNotFoundError):  # no folder can be used, and so not that of Ray
        folders.setdefault(Path(tempfile.gettempdir()), "TMPDIR")
    found = [
        check_disk("temporary disk", folder, ENOUGH_TEMPORARY_BYTES, variable)
        for folder, variable in folders.items()
    ]
    return next((finding for finding in found if finding.verdict != "ok"), found[0])
