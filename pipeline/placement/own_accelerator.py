"""What a worker does with the accelerator that Ray has assigned to it, before it builds an engine.

torch computes on the CPU when it cannot use an accelerator, a hundred times slower and without a word. A
worker that holds one therefore refuses to start instead.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from blip2_actor import EngineBuilder

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def use_own_accelerator(engine: EngineBuilder, accelerators: Mapping[str, float]) -> None:
    """Check the accelerator of this worker, and limit torch to its share of it.

    Args:
        engine: what is to run in this worker; an engine without a `device` needs no accelerator.
        accelerators: what the worker has reserved, by names in Ray; empty on CPUs.

    Raises:
        ValueError: torch cannot use the accelerator.
    """
    if not accelerators or getattr(engine, "device", None) in (None, "cpu"):
        return
    import torch

    if "GPU" not in accelerators or not torch.cuda.is_available():
        raise ValueError(unusable(accelerators, torch.__version__, torch.version.cuda or torch.version.hip))
    share = accelerators["GPU"]
    if share < 1:  # The engine sizes itself by what torch may take.
        torch.cuda.set_per_process_memory_fraction(share, torch.device("cuda", 0))


def unusable(accelerators: Mapping[str, float], version: str, build: str | None) -> str:
    """Return what is wrong with an accelerator that torch does not see, and what to do.

    Args:
        accelerators: what the worker has reserved, by names in Ray.
        version: of torch.
        build: the CUDA or ROCm for which torch is built; None for the CPU.
    """
    reserved = ", ".join(f"{n:g} {name}" for name, n in accelerators.items() if ":" not in name)
    built = f"torch {version} is built for {f'CUDA or ROCm {build}' if build else 'the CPU'}"
    if build is None:
        remedy = "install a build of torch for the accelerator on every node"
    elif nvidia_driver() is None:
        remedy = "install the driver, or give the container access to the device"
    else:
        remedy = "update the driver, or install a build of torch for an older CUDA"
    return (
        f"the accelerator must be one that torch can use, got {reserved} on {os.uname().nodename}, where "
        f"{built} and {nvidia_driver() or 'there is no NVIDIA driver'}; {remedy}, or add --device cpu"
    )


def nvidia_driver() -> str | None:
    """Return the version of this machine's NVIDIA driver in words, or None without one."""
    with contextlib.suppress(OSError):
        found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", NVIDIA_DRIVER.read_text())
        return f"the NVIDIA driver is {found[1]}" if found else "there is an NVIDIA driver of unknown version"
    return None
