"""Engines for tests: in float32 on a CPU, where tokens are exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blip2_actor import EngineConfig


def cpu_config(model: str | Path, *, num_threads: int = 1, **settings: Any) -> EngineConfig:
    return EngineConfig(model=str(model), dtype="float32", device="cpu", num_threads=num_threads, **settings)
