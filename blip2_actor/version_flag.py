"""`--version` of every command: the versions that decide results, and the device.

torch is imported when the flag is given, to find the device; Ray never is.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator
from typing import Any

from blip2_actor import __version__
from blip2_actor.installation import DISTRIBUTION


def version_lines() -> Iterator[str]:
    """Yield the versions that decide results, and the device that "auto" takes on this machine."""
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
        sys.stdout.flush()
        parser.exit()


def add_version_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--version",
        action=VersionAction,
        help="Print the versions of this package, Python, torch, transformers and Ray, and the device; exit.",
    )


def _version_of(package: str) -> str:
    from importlib import metadata  # it imports email and zipfile, too much for --help

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
