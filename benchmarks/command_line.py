"""What the command lines of all benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that prints `description` unchanged and has the option `--output`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="file to which the JSON is also written")
    return parser


def add_models(parser: argparse.ArgumentParser) -> None:
    """Add the option `--models`."""
    parser.add_argument(
        "--models",
        type=Path,
        help="folder that keeps the random checkpoints between runs (default: a temporary folder)",
    )


def check_cases(parser: argparse.ArgumentParser, asked: Collection[str], known: Collection[str]) -> None:
    """Exit with a message if a case is unknown."""
    unknown = set(asked) - set(known)
    if unknown:
        parser.error(f"cases must be among {', '.join(known)}, got {', '.join(sorted(unknown))}")
