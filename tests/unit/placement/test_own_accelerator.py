"""With an accelerator that torch cannot use, the engine used to compute silently on the CPU next to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from blip2_actor import EngineConfig
from blip2_actor.engine.memory import free_bytes
from blip2_actor.testing import FakeEngineConfig
from pipeline.placement import own_accelerator
from pipeline.placement.own_accelerator import unusable, use_own_accelerator

ENGINE = EngineConfig(model="demo")
GPU = {"GPU": 1.0}


def test_what_needs_no_accelerator_is_not_refused() -> None:
    use_own_accelerator(ENGINE, {})
    use_own_accelerator(EngineConfig(model="demo", device="cpu"), GPU)
    use_own_accelerator(FakeEngineConfig(), GPU)


@pytest.mark.parametrize("accelerators", [GPU, {"NPU": 2.0}])
def test_an_accelerator_that_torch_does_not_see_is_refused(
    accelerators: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    name, number = accelerators.copy().popitem()
    with pytest.raises(ValueError, match=f"got {number:g} {name} on .*, where torch {torch.__version__[:3]}"):
        use_own_accelerator(ENGINE, accelerators)


@pytest.mark.parametrize(
    ("build", "driver", "said"),
    [
        (None, "550.54.14", "built for the CPU and the NVIDIA driver is 550.54.14; install a build of torch"),
        ("13.0", "550.54.14", "built for CUDA or ROCm 13.0 and the NVIDIA driver is 550.54.14; update"),
        ("13.0", None, "there is no NVIDIA driver; install the driver, or give the container access"),
    ],
)
def test_the_message_names_driver_build_and_remedy(
    build: str | None, driver: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_accelerator, "NVIDIA_DRIVER", tmp_path / "version")
    if driver:
        line = f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Thu Feb 22 01:44:30 UTC 2024\n"
        (tmp_path / "version").write_text(line)
    message = unusable({"GPU": 1.0, "accelerator_type:L40S": 0.001}, "2.13.0", build)
    assert said in message and "got 1 GPU on" in message and message.endswith("or add --device cpu")


def test_an_engine_on_half_a_gpu_takes_half_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines on one GPU each used to take all that was free, so the second ran out of memory."""
    fractions: dict[Any, float] = {}
    gib = 1 << 30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda f, d: fractions.update({d: f}))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda d: fractions.get(d, 1.0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (40 * gib, 48 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda d: 2 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda d: 1 * gib)
    device = torch.device("cuda", 0)
    assert free_bytes(device) == 41 * gib
    use_own_accelerator(ENGINE, {"GPU": 0.5})
    assert free_bytes(device) == 23 * gib
