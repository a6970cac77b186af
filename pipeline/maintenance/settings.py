"""The settings of `blip2 verify` and `blip2 clean`."""

from __future__ import annotations

from dataclasses import dataclass, field

from blip2_actor.flags import positional
from blip2_actor.inputs.field_types import require_types


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """Read every file of an output back and check rows, order, settings and input. Needs no Ray."""

    output: str = field(metadata=positional())
    """Folder or URI of a run, finished or in progress."""
    input: tuple[str, ...] = ()
    """The input again, if its URIs hold passwords or options: these are not stored in the output."""
    url: str | None = None
    """Also send images to the endpoint at this address, and compare its captions with those of the output."""
    sample: int = 16
    """With --url: maximum number of images to send."""
    key_file: str | None = None
    """With --url: file with the key of the endpoint, if it wants one."""
    json: bool = False
    """Print the counts and all findings as one JSON document."""

    def __post_init__(self) -> None:
        require_types(self)
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {self.url}")
        if self.sample < 1:
            raise ValueError(f"sample must be at least 1, got {self.sample}")
        if self.key_file is not None and self.url is None:
            raise ValueError("key_file must be left out without url")


@dataclass(frozen=True, kw_only=True)
class CleanSettings:
    """Show which files of an output are no longer needed, and delete them with --yes. Needs no Ray."""

    output: str = field(metadata=positional())
    """Folder or URI of a run that no driver works on."""
    yes: bool = False
    """Delete the files; without it they are only listed."""

    def __post_init__(self) -> None:
        require_types(self)
