"""How the process of a command ends."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import atexit, sys
from pipeline import __main__ as command
atexit.register(print, "unloaded")
sys.stdout.write("a line")
command.main = lambda: command.write(sys.stdout, " that is not lost") and 3
command.run()
"""


def test_a_command_ends_without_unloading_its_packages() -> None:
    """Unloading took a second of CPU time; what was printed must still arrive, and the exit status too."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, "a line that is not lost"), done.stderr
