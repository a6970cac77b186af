"""What a captioning run is asked to do: one frozen value, which is also the flags of `blip2 caption`."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from blip2_actor import EngineConfig, GenerationOptions, ModelInfo, Status
from blip2_actor.preprocess import ImageLimits
from pipeline.fingerprint import Fingerprint
from pipeline.flags import hiding, prefixed
from pipeline.placement import Placement
from pipeline.reading import ReadOptions
from pipeline.schema import ROW_CONTRACT, SCHEMA_VERSION, refuse_taken_names
from pipeline.shards import without_secrets

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """Caption every image of an input into Parquet files, one per shard; run again to resume."""

    input: tuple[str, ...]
    """Tars, Parquet files, folders, globs and {00..99} ranges; local or s3://, gs:// and the like."""
    output: str
    """Folder or URI for the results; the run's state stands in it too, under _blip2."""
    prompt: str | None = None
    """Text that every answer continues, such as "Question: what is this? Answer:"; default: captions."""
    format: Literal["auto", "webdataset", "parquet", "folder"] = "auto"
    """What the input is, where its names leave doubt."""
    limit: int | None = None
    """Caption the first so many rows only."""
    max_failed_fraction: float = 0.0
    """Exit status 2 when a larger share of the rows fails. A job of which more than half fails (or more
    than this, where it is larger) stops early."""
    fork: bool = False
    """When the output was begun with other settings, begin a fresh one beside it."""
    engine: EngineConfig = field(default=EngineConfig())
    """model and device"""
    generation: GenerationOptions = field(default=GenerationOptions())
    """generation"""
    reading: ReadOptions = field(
        default=ReadOptions(), metadata=hiding("max_image_bytes", "table_rows", "table_bytes")
    )
    """columns and members"""
    limits: ImageLimits = field(default=ImageLimits(), metadata=prefixed("image"))
    """what one image may cost"""
    placement: Placement = field(default=Placement())
    """actors"""

    def __post_init__(self) -> None:
        if not self.input:
            raise ValueError("input must name at least one file or folder, got none")
        if not 0 <= self.max_failed_fraction <= 1:
            raise ValueError(f"max_failed_fraction must be from 0 to 1, got {self.max_failed_fraction}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")
        if self.prompt is not None and self.reading.prompt_column is not None:
            raise ValueError("prompt_column must be alone, got prompt too; name one of them")
        refuse_taken_names(list(self.reading.kept), ROW_CONTRACT.names, "keep")

    @property
    def read_options(self) -> ReadOptions:
        """Files that decoding would refuse by size are not read at all."""
        return dataclasses.replace(self.reading, max_image_bytes=self.limits.max_file_bytes)

    def fingerprint(self, info: ModelInfo) -> Fingerprint:
        """Everything that decides what the rows say, and nothing else."""
        limits, reading = self.limits, self.reading
        parts = {
            "input": [without_secrets(uri) for uri in self.input],
            "format": self.format,
            "limit": self.limit,
            "model": info.digest,
            "dtype": info.dtype,
            "prompt": self.prompt,
            "options": dataclasses.asdict(self.generation),
            "image": {
                "size_px": info.image_size_px,
                "max_pixels": limits.max_pixels,
                "max_file_bytes": limits.max_file_bytes,
                "jpeg_draft": limits.jpeg_draft,
            },
            "columns": {
                "image": reading.image_column,
                "key": reading.key_column,
                "prompt": reading.prompt_column,
                "keep": reading.keep,
            },
            "schema": {"version": SCHEMA_VERSION, "statuses": [status.value for status in Status]},
        }
        return Fingerprint(json.loads(json.dumps(parts)))

    def as_plain(self) -> dict[str, Any]:
        """Plain values that JSON can hold, without secrets; `from_plain` gives the settings back."""
        inputs = tuple(without_secrets(uri) for uri in self.input)
        return dataclasses.asdict(
            dataclasses.replace(self, input=inputs, output=without_secrets(self.output))
        )


@dataclass(frozen=True, kw_only=True)
class RetrySettings:
    """Run the rows of an output that are not ok once more, and read its partial shards again."""

    output: str
    """Folder or URI of an earlier run."""
    max_failed_fraction: float = 0.0
    """Exit status 2 when a larger share of all rows has still failed."""
    placement: Placement = field(default=Placement())
    """actors"""


@dataclass(frozen=True, kw_only=True)
class StatusSettings:
    """Say what an output holds: done, failed by status, left, and when it will end. Needs no Ray."""

    output: str
    """Folder or URI of a run, finished or at work."""


@dataclass(frozen=True, kw_only=True)
class PlanSettings(CaptionSettings):
    """Say what a caption command would take: time, workers, bottleneck, bytes. Samples; needs no Ray."""

    output: str = ""
    """Folder or URI in which writing is timed; nothing stays there. Default: a folder of this machine."""
    sample: int = 64
    """Rows to read, decode, caption and write."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample < 1:
            raise ValueError(f"sample must be at least 1, got {self.sample}")


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Render a data set, caption it with the demonstration checkpoint, and compare with the truth."""

    output: str = "demo_output"
    """Folder for the data set and the captions; what an earlier demo left in it is replaced."""
    num_images: int = 3000
    """Images to render, the broken ones included."""

    def __post_init__(self) -> None:
        if self.num_images < 100:
            raise ValueError(f"num_images must be at least 100, got {self.num_images}")


def from_plain(cls: type[T], values: Mapping[str, Any]) -> T:
    """A frozen dataclass from plain values, with the dataclasses inside it.

    Raises:
        ValueError: a name is unknown.
    """
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"settings must be those of this version, got unknown {', '.join(unknown)}")
    hints = typing.get_type_hints(cls)
    return cls(
        **{
            name: from_plain(hints[name], value)
            if dataclasses.is_dataclass(hints[name])
            else (tuple(value) if isinstance(value, list) else value)
            for name, value in values.items()
        }
    )
