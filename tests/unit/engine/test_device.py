"""What is decided per device: compile if it works and pays, and run attention without a plan per shape."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import shutil
from collections.abc import Iterator

import pytest
import torch

from blip2_actor.device import prepare_device, resolve_compile, resolve_device, resolve_dtype
from blip2_actor.transfer import ids_to_device

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


def test_the_first_gpu_is_taken_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for is_available, expected in ((True, GPU), (False, CPU)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=is_available: found)
        assert resolve_device("auto") == expected
    assert resolve_device("cuda") == GPU
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"device must exist on this machine, got 'cuda:2'; torch sees 2"):
        resolve_device("cuda:2")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What is installed on this machine; everything at first."""
    found = {"triton", "gcc"}
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in found else None)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in found else None)
    return found


def test_a_gpu_compiles_quantized_encoders_if_the_compilers_are_installed(installed: set[str]) -> None:
    assert resolve_compile("auto", None, GPU, fuses=True)
    assert not resolve_compile("auto", None, GPU)
    assert not resolve_compile("auto", None, CPU, fuses=True)
    assert not resolve_compile("auto", "auto", GPU, fuses=True)


@pytest.mark.parametrize("missing", ["triton", "gcc"])
def test_a_gpu_machine_without_compilers_runs_uncompiled_and_says_so(installed, missing, caplog) -> None:
    installed.remove(missing)
    assert not resolve_compile("auto", None, GPU, fuses=True)
    assert "run uncompiled" in caplog.text


def test_an_explicit_choice_wins(installed: set[str]) -> None:
    installed.clear()
    assert resolve_compile(True, None, CPU)
    assert not resolve_compile(False, None, GPU)


def pretend_cpu(monkeypatch: pytest.MonkeyPatch, name: str, has: set[str]) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "bf16" in has)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "amx" in has)
    cpu = {"cpu_name": name, "avx512_fp16": "fp16" in has}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)


@pytest.mark.parametrize(
    ("name", "has", "limit", "dtype"),
    [
        ("AMD EPYC", set(), "", torch.float32),
        ("AMD EPYC", {"bf16"}, "", torch.bfloat16),
        ("AMD EPYC", {"bf16", "fp16"}, "", torch.bfloat16),
        ("Intel Xeon", {"bf16"}, "", torch.bfloat16),  # Cooper Lake
        ("Intel Xeon", {"bf16", "fp16", "amx"}, "", torch.bfloat16),
        ("Intel Xeon", {"bf16", "fp16", "amx"}, "AVX512_CORE_AMX", torch.bfloat16),
        ("Intel Xeon", {"bf16", "fp16", "amx"}, "AVX512_CORE_FP16", torch.float32),
        ("Intel Xeon", {"bf16", "fp16"}, "", torch.float32),
    ],
)
def test_the_dtype_of_a_cpu_is_the_faster_one(name, has, limit, dtype, monkeypatch) -> None:
    """Without AMX, newer Intel cores took 1.8 times as long in bfloat16, of which they have instructions."""
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    pretend_cpu(monkeypatch, name, has)
    assert resolve_dtype("auto", CPU) is dtype


@pytest.mark.parametrize(
    ("limit", "dtype"),
    [
        ("", torch.bfloat16),
        ("ALL", torch.bfloat16),
        ("avx512_core_bf16", torch.bfloat16),
        ("AVX512_CORE_VNNI", torch.float32),
        ("AVX2", torch.float32),
    ],
)
def test_a_limit_of_instructions_counts_for_the_dtype_too(limit, dtype, monkeypatch) -> None:
    """oneDNN takes no instructions beyond it, and bfloat16 without them is slower than float32."""
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    pretend_cpu(monkeypatch, "AMD EPYC", {"bf16"})
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert resolve_dtype("auto", CPU) is dtype
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", limit)
    assert resolve_dtype("auto", CPU) is dtype, "by its older name"


@pytest.fixture
def devices_set(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """The devices that `torch.cuda.set_device` gets; cuDNN is enabled at first, and restored in the end."""
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    found: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda _: None)
    yield found
    torch.backends.cuda.enable_cudnn_sdp(was_enabled)


def test_attention_on_a_gpu_does_not_use_cudnn(devices_set: list[torch.device]) -> None:
    """cuDNN would build a plan for every shape of prompts and texts."""
    prepare_device(CPU)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    prepare_device(GPU)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert devices_set == [GPU]


def test_the_caches_of_cpu_kernels_are_bounded_unless_the_user_does_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They keep a kernel for each shape, and prompts come in many; `tests/chaos/test_memory.py` measures."""
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "5")
    prepare_device(CPU)
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "128"
    assert os.environ["LRU_CACHE_CAPACITY"] == "5"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no such settings")
def test_the_memory_of_one_tensor_is_kept_for_the_next_on_a_cpu() -> None:
    """Each page that is given back is a fault when the next tensor is filled."""
    prepare_device(CPU)

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(24 << 20, dtype=torch.uint8) for _ in range(6)]
        assert all(tensor[-1] == 1 for tensor in tensors)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    fewest = min(faults() for _ in range(5))
    assert fewest < 4_000  # of 36,864 pages


@pytest.mark.parametrize("sequences", [[[5, 7], [], [3]], [[], []]])
def test_token_ids_travel_together_and_arrive_apart(sequences: list[list[int]]) -> None:
    """Without any id the tensor would not be of integers, and embeddings refuse it."""
    found = ids_to_device(sequences, CPU)
    assert [ids.tolist() for ids in found] == sequences
    assert all(ids.dtype is torch.int64 for ids in found)
