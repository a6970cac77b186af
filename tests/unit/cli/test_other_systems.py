"""Systems other than Linux, simulated by removing what they lack before anything is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

WINDOWS = """
import shutil, signal, sys
sys.platform = "win32"
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
del signal.SIGHUP
from pipeline.__main__ import main
sys.exit(main())
"""
MAC = """
import builtins, io, os, sys
import pydoc, ray, torch, transformers, pyarrow.dataset  # they need the real platform when they are imported
sys.platform = "darwin"
del os.sched_getaffinity
real = io.open

def open_without_proc(file, *arguments, **options):
    if str(file).startswith(("/proc", "/sys")):
        raise FileNotFoundError(2, "No such file or directory", str(file))
    return real(file, *arguments, **options)

builtins.open = io.open = open_without_proc
import numpy as np
from blip2_actor import DecodePool, EngineConfig
from pipeline.plan.make_plan import _num_cpus
with EngineConfig(model="demo", device="cpu", dtype="float32", num_threads=1).build() as engine:
    print(engine.generate(np.zeros((64, 64, 3), np.uint8))[0].status)
with DecodePool(64) as pool:
    print(pool.decode([b""])[0].status, _num_cpus() >= 1)
"""


def _run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


def test_windows_is_refused_in_one_sentence() -> None:
    run = _run(WINDOWS)
    assert run.returncode == 3, run.stderr
    assert run.stderr == (
        "blip2: Windows is not supported, got win32; run it in WSL 2 or in a Linux container\n"
    )


@pytest.mark.slow
def test_the_engine_runs_without_what_only_linux_has() -> None:
    run = _run(MAC)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["ok", "missing_image", "True"]
