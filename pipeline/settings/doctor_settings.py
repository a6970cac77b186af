"""The settings of `blip2 doctor`."""

from __future__ import annotations

from dataclasses import dataclass

from blip2_actor.inputs.field_types import require_types


@dataclass(frozen=True, kw_only=True)
class DoctorSettings:
    """Check this machine, and a model, an input and an output if they are given; nothing is captioned."""

    model: str | None = None
    """Hub name, folder, s3:// or gs:// folder, or demo: whether it can be read, and fits into memory."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    input: tuple[str, ...] = ()
    """Files, folders or globs: whether they can be listed, and the first image can be read and decoded."""
    output: str | None = None
    """Folder or URI: whether it can be written, read and deleted from."""
    json: bool = False
    """Print the checks as one JSON document."""

    def __post_init__(self) -> None:
        require_types(self)
