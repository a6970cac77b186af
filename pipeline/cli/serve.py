"""`blip2 serve` is `python -m deploy`: the batch job does not import the endpoint, it becomes it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds this package and `deploy` next to it."""


def become_deployment(arguments: Sequence[str]) -> NoReturn:
    """Replace this process with `python -m deploy`; signals and exit status are those of the endpoint.

    A user's own `deploy.py` or `deploy/` must not be started instead: -P keeps the working folder out of the
    import path, and our folder comes before all others that PYTHONPATH names.
    """
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    os.execve(sys.executable, [sys.executable, "-P", "-m", "deploy", *arguments], environment)
