"""Checks of torch and of the accelerator: a build that does not fit the driver computes on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from blip2_actor import free_bytes, resolve_device, resolve_dtype
from pipeline.finding import Finding, gib
from pipeline.placement.own_accelerator import NVIDIA_DRIVER

PRODUCT_ROWS = 2048
COPIED_BYTES = 256 << 20
"""Larger than the caches of a processor."""
MEASURED_S = 0.3


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


def check_speed() -> Finding:
    """Measure a product of matrices in the dtype of a run, and a copy within the memory of the device."""
    device = resolve_device("auto")
    dtype = resolve_dtype("auto", device)
    try:
        left, right = torch.randn(2, PRODUCT_ROWS, PRODUCT_ROWS, device=device).to(dtype)
        product_s = _seconds(lambda: left @ right, device)
        source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy_s = _seconds(lambda: target.copy_(source), device)
    except RuntimeError as error:  # no kernel for this GPU, no memory
        remedy = "free memory, or install a build of torch for this device"
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        return Finding("speed", "fail", f"torch cannot compute on {device}: {first_line}", remedy)
    tera = 2 * PRODUCT_ROWS**3 / product_s / 1e12
    name = str(dtype).removeprefix("torch.")
    copied = COPIED_BYTES / copy_s / 1e9
    return Finding("speed", "ok", f"{tera:,.2f} TFLOP/s in {name}, copies {copied:,.1f} GB/s on {device}")


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the shortest of the times that some work takes."""
    times: list[float] = []
    work()
    while not times or sum(times) < MEASURED_S:
        _finish(device)
        began = time.perf_counter()
        work()
        _finish(device)
        times.append(time.perf_counter() - began)
    return min(times)


def _finish(device: torch.device) -> None:
    """Wait until a device has done what was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
