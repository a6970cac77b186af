"""Where our packages are, which packages of an extra are missing, and why Ray does not start here.

It imports the standard library only, so that a command can say what is missing when almost nothing is
installed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds `blip2_actor`, `pipeline` and `deploy`: a source tree or site-packages."""
DISTRIBUTION = "blip2-ray"
EXTRA_OF_SCHEME = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""The extra that brings the package for a URI scheme."""
BAD_FOLDER = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EROFS, errno.ENAMETOOLONG}
"""`errno` of an OSError if the folder that it names cannot be used."""


class MissingPackages(Exception):
    """Packages that a command needs are not installed; the message has the command that installs them."""


def require_packages(command: str, packages: Sequence[str], extra: str) -> None:
    """Check that packages can be imported, without importing them.

    Raises:
        MissingPackages: at least one cannot.
    """
    missing = [package for package in packages if not _can_be_imported(package)]
    if missing:
        raise MissingPackages(f"{command} needs {' and '.join(missing)}; run: {pip_install(extra)}")


def pip_install(extra: str) -> str:
    """Return the command that installs this distribution with one of its extras."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def install_hint(scheme: str) -> str:
    """Return the end of a sentence about a URI whose package is missing: the command that installs it."""
    extra = EXTRA_OF_SCHEME.get(scheme)
    return f"; run: {pip_install(extra)}" if extra else "; install the package that it names"


def ray_folder() -> Path:
    """Return the folder in which a Ray that starts on this machine keeps its files (Ray 2.60, Linux)."""
    return Path(os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp")), "ray")


def ray_start_remedy(error: Exception) -> str:
    """Return what to do about an error with which Ray did not start on this machine."""
    if isinstance(error, UnicodeError) or (isinstance(error, OSError) and _is_about_folder(error)):
        return (
            f"it keeps its files in {ray_folder()}; set RAY_TMPDIR to a folder that can be written, with a "
            "short path of ASCII characters"
        )
    return (
        "when the machine is busy or short of memory or disk space, wait or free some, and run the same "
        "command again"
    )


def _is_about_folder(error: OSError) -> bool:
    """Return whether Ray cannot use its folder; it says without an `errno` that a path is too long."""
    if error.errno is None:
        return "AF_UNIX" in str(error)
    path = error.filename
    is_below = path is None or Path(os.fsdecode(path)).is_relative_to(ray_folder().parent)
    return error.errno in BAD_FOLDER and is_below


def _can_be_imported(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # ValueError: something in sys.modules that was never found by a finder
        return False
