"""The settings of `blip2 submit`, and where the command that it submits begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from blip2_actor.flags import split_uri

JOBS = ("caption", "embed", "score", "retry", "plan")
"""Commands that run as a job."""


@dataclass(frozen=True, kw_only=True)
class SubmitSettings:
    """Run caption, embed, score, retry or plan on a cluster: blip2 submit [--address ADDRESS] caption ..."""

    address: str | None = None
    """Address of the cluster's dashboard, such as http://127.0.0.1:8265; default: RAY_API_SERVER_ADDRESS."""
    no_wait: bool = False
    """Return as soon as the job is submitted, and do not follow its log."""
    job: tuple[str, ...] = field(default=())
    """Command line of the job, as in a terminal."""
    job_flags: Mapping[str, Any] = field(default_factory=dict)
    """What its flags say, by the names of the settings."""
    job_settings: type = field(default=type(None))
    """The dataclass of these settings."""

    def __post_init__(self) -> None:
        if not self.job:
            raise ValueError(f"a command must come last, one of {', '.join(JOBS)}, with its flags")
        if self.address is not None:
            require_dashboard("address", self.address)


def require_dashboard(name: str, address: str) -> None:
    """Raise ValueError unless an address is that of a dashboard.

    Args:
        name: of the setting or the variable that holds it.
    """
    if not address.startswith(("http://", "https://")):
        raise ValueError(
            f"{name} must be that of the dashboard, such as http://127.0.0.1:8265, got {address}"
        )
    split_uri(name, address)  # which refuses a port that is no number


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return `submit` with its own flags, and the command line of the job, which follows them.

    Raises:
        ValueError: `submit` is followed by a word that is no job.
    """
    start = next((n for n, word in enumerate(arguments) if word in JOBS), len(arguments))
    if start == len(arguments) > 1 and not arguments[1].startswith("-"):
        raise ValueError(f"a job must be one of {', '.join(JOBS)}, got {arguments[1]}")
    return [word for word in arguments[:start] if word != "--"], list(arguments[start:])
