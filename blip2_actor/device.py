"""Which device, which dtype, compiled or not: the one place that resolves "auto"."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable
from typing import Literal, TypeVar

import torch

logger = logging.getLogger(__name__)


def resolve_device(device: str) -> torch.device:
    """Return a device; "auto" is the first accelerator, or the CPU if there is none.

    Raises:
        ValueError: this machine has no such device.
    """
    if device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise ValueError(f'device must be "auto", "cpu" or "cuda[:N]", got {device!r}')
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device must exist on this machine, got {device!r}; torch sees {torch.cuda.device_count()} CUDA "
            "devices; use --device auto, or install a torch build for your accelerator"
        )
    return torch.device("cuda", resolved.index or 0) if resolved.type == "cuda" else resolved


MAX_CPU_KERNELS = 128
"""Kernels that each of oneDNN's two caches keeps; it makes one for each shape.

With its own 1,024, memory grows by 900 MB in 10,000 requests with prompts of many lengths. With 128 it grows
by 130 MB, and a request takes 4 % more CPU time (demonstration checkpoint in float32 on one AVX512 core,
2026-11-26).
"""


FREED_BYTES_KEPT = 512 << 20
"""Freed memory at the end of the heap that glibc keeps for the next tensors on a CPU."""
_MAX_BLOCK_BYTES = 32 << 20
"""Blocks of this size or more go back to the system at once; glibc takes no larger value."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""glibc's numbers of its settings, from its `malloc.h`."""

FIRST = -1
"""Priority of the streams whose work goes first on a GPU: prefill and decode steps, before encoders."""


def prepare_device(device: torch.device) -> None:
    """Make a device current for the calling thread, and settle what holds for the whole process.

    On a CPU, freed memory is kept for the next tensors, and the caches of kernels are bounded, unless the
    process has computed something before, or the user has set a bound.

    On a GPU, the calling thread gets a stream of its own, whose work goes before that of ordinary streams.
    And cuDNN attention is disabled. On recent GPUs torch prefers it (`sdp_utils.cpp`,
    `check_prefer_cudnn_attention`). cuDNN builds a plan on the host for each exact shape. Prompts, texts and
    batches come in so many shapes that the plans would take more time than attention itself. Flash and
    memory-efficient attention take any shape without a plan.
    """
    if device.type == "cpu":
        for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(name, str(MAX_CPU_KERNELS))
        _keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream(device, priority=FIRST))
        torch.backends.cuda.enable_cudnn_sdp(False)


def _keep_freed_memory() -> None:
    """Have this process keep up to `FREED_BYTES_KEPT`, instead of returning it after each operation.

    Without it, filling each large tensor begins with page faults. They take 7 % of the CPU time of a run with
    the demonstration checkpoint and 2 % with the mid-size model (AMD EPYC, 2026-11-26). A user's own setting
    counts, and another C library than glibc goes on as before.
    """
    is_set = {"MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys()
    if not is_set and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAX_BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, FREED_BYTES_KEPT)


def set_num_threads(num_threads: int) -> None:
    """Set how many CPU threads torch uses for what the calling thread computes.

    torch initializes this number for each thread when the thread first asks for it, and that would undo an
    earlier `torch.set_num_threads`. So this asks first.
    """
    torch.get_num_threads()
    torch.set_num_threads(num_threads)


def resolve_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Return a dtype; "auto" is bfloat16 if the device is fast in it, else float32.

    Raises:
        ValueError: the device does not compute in the wanted dtype.
    """
    if wanted != "auto":
        dtype: torch.dtype = getattr(torch, wanted)
        if device.type == "cpu" and dtype is torch.float16:
            raise ValueError("dtype must be float32 or bfloat16 on a CPU, got float16; use --dtype auto")
        if device.type == "cuda" and dtype is torch.bfloat16 and not torch.cuda.is_bf16_supported():
            raise ValueError(f"dtype must be float32 or float16 on {device}, got bfloat16; use --dtype auto")
        return dtype
    return torch.bfloat16 if is_fast_in_bfloat16(device) else torch.float32


_LIMITS_WITHOUT_BFLOAT16 = (
    *("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2"),
    *("AVX512_CORE", "AVX512_CORE_VNNI"),
)
"""Values of `ONEDNN_MAX_CPU_ISA` with which oneDNN multiplies no bfloat16."""


def onednn_limit() -> str:
    """Return the instructions to which `ONEDNN_MAX_CPU_ISA` limits oneDNN, such as "AVX2"; "" is no limit."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return "" if limit.upper() in ("ALL", "DEFAULT") else limit.upper()


def is_fast_in_bfloat16(device: torch.device) -> bool:
    """Return True if bfloat16 matrix products are faster than those in float32.

    They are on recent GPUs, and on CPUs with AMX or AVX512-BF16. But Intel's cores with AVX512-FP16 (Sapphire
    Rapids and later) multiply bfloat16 by AMX. Where a virtual machine hides AMX, they have only AVX512-BF16,
    with 0.56 of the speed of float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    limit = onednn_limit()
    if device.type != "cpu" or limit in _LIMITS_WITHOUT_BFLOAT16:
        return False
    if torch.cpu._is_amx_tile_supported() and "AMX" in (limit or "AMX"):
        return True
    cpu = torch.cpu.get_capabilities()
    is_slow = cpu.get("avx512_fp16", False) and "Intel" in cpu.get("cpu_name", "")
    return torch.cpu._is_avx512_bf16_supported() and not is_slow


def has_triton() -> bool:
    """Return whether kernels for a GPU can be compiled here: triton needs a C compiler for its launchers."""
    has_compiler = "CC" in os.environ or any(map(shutil.which, ("gcc", "clang")))
    return importlib.util.find_spec("triton") is not None and has_compiler


KernelT = TypeVar("KernelT")


def find_kernel(device: torch.device, purpose: str, load: Callable[[], KernelT]) -> KernelT | None:
    """Return a kernel of this package, if it can be compiled and run on a device; otherwise log why not.

    Args:
        purpose: what the kernel does, for the log.
        load: compiles the kernel, runs it once, and returns it.
    """
    if device.type != "cuda":
        return None
    try:
        if not has_triton():
            raise ImportError("triton or a C compiler is not installed")
        kernel = load()
        torch.cuda.current_stream(device).synchronize()
    except Exception as error:  # an old compiler or driver raises errors of any class
        logger.warning("%s: torch's own kernels are used, which are slower: %r", purpose, error)
        return None
    return kernel


def resolve_compile(
    wanted: bool | Literal["auto"], device_map: str | None, device: torch.device, fuses: bool = False
) -> bool:
    """Return whether the encoders are compiled.

    "auto" is True on a GPU that `has_triton` if this `fuses` the quantization of inputs with what stands
    before it: in int8, and in fp8 from other dtypes than bfloat16, which has a kernel. Plain encoders gain
    nothing: on an H100 a block of the vision encoder takes 1.71 ms compiled and 1.65 ms as it is (64 images,
    bfloat16, torch 2.11, 2026-11-26).
    """
    if wanted != "auto":
        return wanted
    if device.type != "cuda" or device_map is not None or not fuses:
        return False
    if not has_triton():
        logger.warning("The encoders run uncompiled: triton or a C compiler is not installed")
        return False
    logger.info("The encoders are compiled at start; this takes a minute or two, --compile false skips it")
    return True
