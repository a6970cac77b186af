"""The settings of `blip2 demo`."""

from __future__ import annotations

from dataclasses import dataclass

from blip2_actor.inputs.field_types import require_types


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Render a data set, caption it with the demonstration checkpoint, and compare with the ground truth."""

    output: str = "demo_output"
    """Folder for the data set and the captions; files of an earlier demo in it are replaced."""
    num_images: int = 3000
    """Number of images to render, including the broken ones."""

    def __post_init__(self) -> None:
        require_types(self)
        if not self.output:
            raise ValueError("output must be the name of a folder, got ''")
        if self.num_images < 100:
            raise ValueError(f"num_images must be at least 100, got {self.num_images}")
