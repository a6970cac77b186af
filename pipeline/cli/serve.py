"""`blip2 serve` is `python -m deploy`: the batch job does not import the endpoint, it becomes it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from blip2_actor.installation import ROOT


def become_deployment(arguments: Sequence[str]) -> NoReturn:
    """Replace this process with `python -m deploy`; signals and exit status are those of the endpoint."""
    command = deployment_command(arguments)
    os.execve(command[0], command, deployment_environment())


def deployment_command(arguments: Sequence[str]) -> list[str]:
    """Return the command line of `python -m deploy`.

    A user's own `deploy.py` or `deploy/` must not be started instead: -P keeps the working folder out of the
    import path, and `deployment_environment` puts our folder before all others that PYTHONPATH names.
    """
    return [sys.executable, "-P", "-m", "deploy", *arguments]


def deployment_environment() -> dict[str, str]:
    """Return the environment of `python -m deploy`."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
