"""What is installed here: versions, and packages that an extra of the distribution brings.

Stdlib alone, so that a command can say what is missing where almost nothing is installed. Only
`version_lines` imports torch, to find the device; nothing here imports Ray.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from typing import Any

DISTRIBUTION = "blip2-ray"
EXTRA_OF_SCHEME = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""The extra that brings the package for a URI scheme."""


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


def version_lines() -> Iterator[str]:
    """Yield the versions that decide results, and the device that "auto" takes on this machine."""
    from blip2_actor import __version__

    yield f"{DISTRIBUTION} {__version__}"
    yield f"Python {platform.python_version()} ({sys.executable})"
    for package in ("torch", "transformers", "ray"):
        yield f"{package} {_version_of(package)}"
    yield f"device {_device()}"


class VersionAction(argparse.Action):
    """`--version`: print `version_lines` and exit."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(nargs=0, default=argparse.SUPPRESS, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        sys.stdout.write("".join(f"{line}\n" for line in version_lines()))
        parser.exit()


def add_version_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--version",
        action=VersionAction,
        help="Print the versions of this package, Python, torch, transformers and Ray, and the device; exit.",
    )


def _can_be_imported(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # ValueError: something in sys.modules that was never found by a finder
        return False


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _device() -> str:
    try:
        import torch

        from blip2_actor.device import resolve_device
    except ImportError:
        return "unknown without torch"
    device = resolve_device("auto")
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
