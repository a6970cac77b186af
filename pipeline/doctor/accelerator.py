"""Checks of torch and of the accelerator: a build that does not fit the driver computes on the CPU."""

from __future__ import annotations

from pathlib import Path

import torch

from blip2_actor import free_bytes, resolve_device, resolve_dtype
from pipeline.finding import Finding, gib

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def check_torch() -> Finding:
    """Compare the build of torch with the driver of this machine."""
    build = torch.version.cuda or torch.version.hip
    found = f"{torch.__version__}, built for {f'CUDA or ROCm {build}' if build else 'the CPU'}"
    has_driver = NVIDIA_DRIVER.exists()
    if has_driver and build is None:
        remedy = "install a build of torch for the driver; this one computes on the CPU"
        return Finding("torch", "fail", f"{found}, and this machine has an NVIDIA driver", remedy)
    if has_driver and not torch.cuda.is_available():
        remedy = "update the driver, or install a build of torch for an older CUDA; look at nvidia-smi"
        return Finding("torch", "fail", f"{found}, and sees no device of the NVIDIA driver", remedy)
    return Finding("torch", "ok", found)


def check_device() -> Finding:
    """Say what "auto" takes."""
    device = resolve_device("auto")
    dtype = str(resolve_dtype("auto", device)).removeprefix("torch.")
    free = gib(free_bytes(device))
    if device.type == "cuda":
        name, count = torch.cuda.get_device_name(device), torch.cuda.device_count()
        return Finding("device", "ok", f"{count} × {name}, {dtype}, {free} free on {device}")
    return Finding("device", "ok", f"CPU with {torch.get_num_threads()} threads, {dtype}, {free} free")
