"""A program that ends while an engine works or frees its model is not aborted, and waits for no result.

A thread within torch while the interpreter is torn down aborts the process: "terminate called without an
active exception".
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

ENDS = {
    "released": (0, "freed"),
    "interrupted": (0, "step"),
    "interrupted_twice": (130, ""),
    "exiting_callbacks": (0, "step"),
    "resubmitting_callbacks": (0, "step refused"),
    "no_thread": (0, "can't start new thread"),
    "loading": (0, "interrupted loaded"),
}
"""For each way of `ways`: the exit status, and what has happened by then."""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "tests.unit.engine.exit.ways",
        str(tmp_path_factory.mktemp("opt")),
        *ENDS,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)


@pytest.mark.parametrize("way", ENDS)
def test_the_exit_waits_for_the_step_and_no_longer(
    program: subprocess.CompletedProcess[str], way: str
) -> None:
    assert tuple(json.loads(program.stdout.splitlines()[-1])[way]) == ENDS[way]


def test_nothing_is_left_to_complain_of(program: subprocess.CompletedProcess[str]) -> None:
    """A thread that never began used to be joined, and an exit callback ended in an error."""
    assert "Ctrl-C again ends it at once" in program.stderr
    assert "atexit callback" not in program.stderr and "terminate called" not in program.stderr
