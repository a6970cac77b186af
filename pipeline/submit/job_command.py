"""The command of a job, checked before it is sent: what cannot work on a cluster is refused here."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from blip2_actor.flags import split_uri
from pipeline.storage.secrets import hide_secrets

MAX_SLUG_CHARS = 40
SAFE_OPTIONS = {"region", "scheme", "endpoint_override", "allow_bucket_creation", "anonymous"}
"""Options of URIs that hold no secret."""
PLACES = ("input", "output", "keys", "calibration", "endpoint_key_file")
"""Settings that name files and folders."""
CHECKPOINTS = ("model", "adapter", "score_model")
"""Settings that name a folder, a file, or a checkpoint on the hub."""


@dataclass(frozen=True)
class JobCommand:
    """A command line that a job can run."""

    arguments: tuple[str, ...]
    """The command and its flags."""
    output: str
    """Where it writes. A plan leaves nothing there, and has a name instead."""

    @property
    def entrypoint(self) -> str:
        """What a shell on the head runs."""
        return shlex.join(["python", "-m", "pipeline", *self.arguments])

    @property
    def submission_id(self) -> str:
        """A name that says which output it is, and the same one for the same output."""
        output = self.output.rstrip("/")
        slug = re.sub(r"[^a-z0-9]+", "-", output.rpartition("/")[2].lower()).strip("-")[:MAX_SLUG_CHARS]
        return f"blip2-{slug or 'output'}-{hashlib.sha256(output.encode()).hexdigest()[:8]}"


def check_command(arguments: Sequence[str], given: Mapping[str, Any]) -> JobCommand:
    """Check a command that is to run on a cluster.

    Args:
        arguments: the command and its flags.
        given: the values that these flags have, by the names of their settings.

    Raises:
        ValueError: a path is relative, or a URI holds a password.
    """
    for name in PLACES:
        for place in _each(given.get(name)):
            place = place.removeprefix("@") if name == "input" else place  # of a manifest
            _require_same_everywhere(name, place)
            _require_no_secret(name, place)
    for name in CHECKPOINTS:
        for place in _each(given.get(name)):
            if not _is_name(place):
                _require_same_everywhere(name, place)
            _require_no_secret(name, place)
    if arguments[0] != "plan":
        return JobCommand(tuple(arguments), given["output"])
    if not given.get("on_cluster"):
        raise ValueError("on_cluster must be set for a submitted plan; without it, the head is measured")
    return JobCommand(tuple(arguments), f"plan of {' '.join(given['input'])}")


def _each(value: str | Sequence[str] | None) -> Sequence[str]:
    return (value,) if isinstance(value, str) else value or ()


def _is_name(checkpoint: str) -> bool:
    """Return whether a checkpoint is one of the hub or of this package, which every machine knows by name."""
    is_path = checkpoint.startswith((".", "/", "~")) or Path(checkpoint).exists()
    return checkpoint == "demo" or not ("://" in checkpoint or is_path)


def _require_same_everywhere(name: str, path: str) -> None:
    """Refuse a path that means another file on the cluster."""
    if "://" not in path and not path.startswith("/"):
        raise ValueError(
            f"{name} must be a URI or an absolute path in a submitted job, got {path}: the job runs in a "
            "folder on the cluster that Ray deletes after it; name a bucket, or a disk that all nodes share"
        )


def _require_no_secret(name: str, uri: str) -> None:
    """Refuse a URI with a password, or with an option that may be one."""
    if "://" not in uri:
        return
    parts = split_uri(name, uri)
    options = {option for option, _ in parse_qsl(parts.query, keep_blank_values=True)}
    if parts.password is not None or options - SAFE_OPTIONS:
        raise ValueError(
            f"{name} must hold no password in a submitted job, got one in {hide_secrets(uri)}: Ray shows the "
            "command to every user of the cluster; give the nodes a role or environment variables instead"
        )
