"""`blip2 serve` is `python -m deploy`: the batch job does not import the endpoint, it becomes it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from blip2_actor.installation import ROOT


def become_deployment(arguments: Sequence[str]) -> NoReturn:
    """Replace this process with `python -m deploy`; signals and exit status are those of the endpoint."""
    command, environment = deployment(arguments)
    os.execve(command[0], command, environment)


def deployment(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command line and the environment of `python -m deploy`.

    A user's own `deploy.py` or `deploy/` must not be started instead: -P keeps the working folder out of the
    import path, and our folder stands before all others that PYTHONPATH names.
    """
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return [sys.executable, "-P", "-m", "deploy", *arguments], environment
