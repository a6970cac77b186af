"""How the process of a command ends."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from pipeline.cli import main
from pipeline.cli.command_table import Command
from pipeline.progress import writing

PROGRAM = """
import atexit, sys
from pipeline import __main__ as command
atexit.register(print, "unloaded")
sys.stdout.write("a line")
command.main = lambda: command.write(sys.stdout, " that is not lost") and 3
command.run()
"""


def test_a_command_ends_without_unloading_its_packages() -> None:
    """Unloading used to take a second of CPU time. All output and the exit status must still arrive."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, "a line that is not lost"), done.stderr


def test_a_library_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken torch, for which users run `blip2 doctor`, used to be reported as an unwritable output."""

    def load(arguments: list[str]) -> int:
        raise OSError("libcublas.so.12: cannot open shared object file")

    monkeypatch.setattr(main, "_run", load)
    with pytest.raises(OSError, match=r"libcublas\.so\.12"):
        main.main(["doctor"])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is of Linux")
@pytest.mark.parametrize("words", [["config", "show", "captions"], ["completion", "bash"], ["--help"]])
def test_output_that_a_full_disk_does_not_take_is_a_failure(words: list[str]) -> None:
    """On a full disk, `blip2 show --json > rows.jsonl` used to lose its rows and exit with 0."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert done.stderr == "blip2: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize(
    ("words", "status"), [("--version >&-", 0), ("show 2>&-", 3), ("show <&- >&- 2>&-", 3)]
)
def test_a_process_may_be_started_without_streams(words: str, status: int) -> None:
    """The usage of a command used to be a traceback, and files received the messages of native code."""
    done = subprocess.run(["/bin/sh", "-c", f"exec {sys.executable} -m pipeline {words}"], timeout=60)
    assert done.returncode == status


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("plan in", 1),
        ("plan embed in --embed v=vision", 1),
        ("caption in -o out", 0),
        ("demo", 1),
        ("submit plan s3://b/in --on-cluster", 1),
        ("submit --no-wait caption s3://b/in -o s3://b/out", 1),
        ("submit caption s3://b/in -o s3://b/out", 0),
    ],
)
def test_a_plan_that_a_full_disk_does_not_take_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, words: str, status: int
) -> None:
    """On a full disk, `blip2 plan --json > plan.json` used to leave an empty file and exit with 0.

    A job's results are in its output. Those of `demo`, of a submitted plan, and of --no-wait are printed.
    """
    monkeypatch.setattr(writing, "_lost", OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(Command, "load", lambda command: lambda settings: 0)
    assert main.main(words.split()) == status
