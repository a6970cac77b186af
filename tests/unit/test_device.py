"""What "auto" means for compiling: only where it can work and pays."""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch

from blip2_actor import EngineConfig
from blip2_actor.device import resolve_compile

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What this machine has; everything at first."""
    found = {"triton", "cc"}
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in found else None)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in found else None)
    return found


def test_a_gpu_compiles_where_its_compilers_are(installed: set[str]) -> None:
    assert resolve_compile(EngineConfig(), GPU)
    assert not resolve_compile(EngineConfig(), CPU)
    assert not resolve_compile(EngineConfig(device_map="auto"), GPU)


@pytest.mark.parametrize("missing", ["triton", "cc"])
def test_a_bare_gpu_machine_runs_uncompiled_and_says_so(installed, missing, caplog) -> None:
    installed.remove(missing)
    assert not resolve_compile(EngineConfig(), GPU)
    assert "run uncompiled" in caplog.text


def test_what_is_asked_for_wins(installed: set[str]) -> None:
    installed.clear()
    assert resolve_compile(EngineConfig(compile=True), CPU)
    assert not resolve_compile(EngineConfig(compile=False), GPU)
