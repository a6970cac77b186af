"""Without AVX512 both engines still compute in bfloat16, slowly; a variable hides the instructions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blip2_actor.testing import save_tiny_retrieval_checkpoint

PROGRAM = """
import logging, sys
import numpy as np
from blip2_actor import EngineConfig, MatchingConfig, Request
logging.basicConfig()
picture = np.zeros((64, 64, 3), np.uint8)
if sys.argv[1] == "caption":
    with EngineConfig(model=sys.argv[2], device="cpu", dtype=sys.argv[3]).build() as engine:
        assert engine.generate([Request(image=picture)])[0].ok
        assert engine.score([picture], ["a dog"])[0].logprob < 0
else:
    with MatchingConfig(model=sys.argv[2], device="cpu", dtype=sys.argv[3]).build() as engine:
        assert 0 <= engine.score([picture], ["a dog"])[0].itm <= 1
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["caption", "match"])
def test_an_engine_runs_on_a_cpu_with_avx2_only(kind: str, dtype: str, tmp_path: Path) -> None:
    model = "demo" if kind == "caption" else str(save_tiny_retrieval_checkpoint(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind, model, dtype],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert ("slow in bfloat16" in done.stderr) is (dtype == "bfloat16")
