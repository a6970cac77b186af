"""What a run is asked to do: one frozen value per command, which is also the command's flags.

Captions, embeddings and scores are one job, `CaptionSettings`, that differs in its outputs.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from blip2_actor import EngineBuilder, EngineConfig, GenerationOptions, ImageLimits, ModelInfo, Status
from blip2_actor.flags import former_names, hiding, prefixed, written_as
from pipeline.column_names import COLUMN_NAMES, SCHEMA_VERSION, refuse_taken_names
from pipeline.inputs.reader import ReadOptions
from pipeline.inputs.shards import without_secrets
from pipeline.settings.fingerprint import Fingerprint
from pipeline.settings.outputs import FORMS, SHARED_WITH_SCORE_MODEL, Outputs, ScoreKind
from pipeline.settings.placement import Placement

T = TypeVar("T")
NO_FLAGS = ("max_image_bytes", "table_rows", "table_bytes", "text_columns")
"""Of `ReadOptions`: what users cannot set."""


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """What every job over an input is told: where from and to, with what model, on what actors."""

    input: tuple[str, ...]
    """Tars, Parquet files, folders, globs and {00..99} ranges; local or s3://, gs:// and the like."""
    output: str
    """Folder or URI for the results; the run's state stands in it too, under _blip2."""
    format: Literal["auto", "webdataset", "parquet", "folder"] = "auto"
    """What the input is, where its names leave doubt."""
    limit: int | None = None
    """Take the first so many rows only."""
    max_failed_fraction: float = 0.0
    """Exit status 2 when a larger share of the rows fails. A job of which more than half fails (or more
    than this, where it is larger) stops early."""
    fork: bool = False
    """When the output was begun with other settings, begin a fresh one beside it."""
    engine: EngineConfig = field(default=EngineConfig())
    """model and device"""
    reading: ReadOptions = field(default=ReadOptions(), metadata=hiding(*NO_FLAGS))
    """columns and members"""
    limits: ImageLimits = field(default=ImageLimits(), metadata=prefixed("image"))
    """what one image may cost"""
    placement: Placement = field(default=Placement())
    """actors"""

    def __post_init__(self) -> None:
        if not self.input:
            raise ValueError("input must name at least one file or folder, got none")
        _require_fraction(self.max_failed_fraction)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")
        refuse_taken_names(list(self.reading.kept), COLUMN_NAMES, "keep")


@dataclass(frozen=True, kw_only=True)
class CaptionSettings(JobSettings):
    """Caption every image of an input into Parquet files, one per shard; run again to resume."""

    prompt: str | None = None
    """Text that every answer continues, such as "Question: what is this? Answer:"; default: captions."""
    reuse_identical: bool = False
    """Make the texts of images whose bytes are the same once per actor; the rows are the same without."""
    outputs: Outputs = field(default=Outputs(), metadata=hiding("caption"))
    """more of each image, in the same pass of the vision encoder"""
    generation: GenerationOptions = field(default=GenerationOptions())
    """generation"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt is not None and self.reading.prompt_column is not None:
            raise ValueError("prompt_column must be alone, got prompt too; name one of them")
        self.outputs.refuse_taken([*COLUMN_NAMES, *self.reading.kept])

    def job(self) -> CaptionSettings:
        return self

    @property
    def builder(self) -> EngineBuilder:
        """The engine that makes what is asked for."""
        builder = self.outputs.matching(self.engine) if self.outputs.only_matches else self.engine
        return typing.cast(EngineBuilder, builder)

    @property
    def read_options(self) -> ReadOptions:
        """Files that decoding would refuse by size are not read at all; texts to score are."""
        return dataclasses.replace(
            self.reading,
            max_image_bytes=self.limits.max_file_bytes,
            text_columns=self.outputs.text_columns,
        )

    def fingerprint(self, info: ModelInfo) -> Fingerprint:
        """Everything that decides what the rows say, and nothing else.

        The limits of time and memory of one image are left out: whom they strike depends on the machine.
        """
        limits, reading = self.limits, self.reading
        parts = {
            "input": [without_secrets(uri) for uri in self.input],
            "format": self.format,
            "limit": self.limit,
            "model": info.digest,
            "dtype": info.dtype,
            "prompt": self.prompt,
            "options": dataclasses.asdict(self.generation),
            "outputs": self.outputs.parts,
            "score_model": self.outputs.score_digest(self.engine, info),
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold, without secrets; `from_dict` gives the settings back."""
        inputs = tuple(without_secrets(uri) for uri in self.input)
        return dataclasses.asdict(
            dataclasses.replace(self, input=inputs, output=without_secrets(self.output))
        )


@dataclass(frozen=True, kw_only=True)
class EmbedSettings(JobSettings):
    """Embed every image of an input into Parquet files; no text is written. Run again to resume."""

    embed: tuple[str, ...] = field(default=("embedding=qformer",), metadata=written_as(FORMS["embed"]))
    """A column of float32 vectors; KIND is vision (the vision encoder's pooled output),
    qformer (the mean of the Q-Former's queries) or queries (every query)."""
    reading: ReadOptions = field(default=ReadOptions(), metadata=hiding(*NO_FLAGS, "prompt_column"))
    """columns and members"""

    def job(self) -> CaptionSettings:
        return CaptionSettings(**_shared(self), outputs=Outputs(caption=False, embed=self.embed))


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(JobSettings):
    """Score a text beside every image of an input: how well they fit. Run again to resume."""

    text_column: str
    """Column, or extension of the member, with the text; a row without one has no score."""
    name: str = "score"
    """Column of the output with the score."""
    prompt: str | None = None
    """Text between image and text, such as the question whose answer is scored."""
    score_model: str | None = None
    """Retrieval checkpoint, such as Salesforce/blip2-itm-vit-g, that computes the scores; no other model is
    loaded. Default: the log-probability by the language model of --model."""
    score_revision: str | None = None
    """Commit, tag or branch of a retrieval checkpoint on the hub; pin it for reproducible scores."""
    score_kind: ScoreKind | None = None
    """Of a retrieval checkpoint: itm is the probability that image and text match, itc the cosine of their
    contrastive embeddings; default: itm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score_model is None:
            return
        for name, value in (("prompt", self.prompt), ("prompt_column", self.reading.prompt_column)):
            if value is not None:
                raise ValueError(f"{name} must be left out with score_model, which reads the text alone")
        for name in (option.name for option in dataclasses.fields(EngineConfig)):
            if name in SHARED_WITH_SCORE_MODEL:
                continue
            if getattr(self.engine, name) != getattr(EngineConfig(), name):
                raise ValueError(f"{name} must be left out with score_model, the only model that is loaded")

    def job(self) -> CaptionSettings:
        outputs = Outputs(
            caption=False,
            score=(f"{self.name}={self.text_column}",),
            score_model=self.score_model,
            score_revision=self.score_revision,
            score_kind=self.score_kind,
        )
        return CaptionSettings(**_shared(self), prompt=self.prompt, outputs=outputs)


def _require_fraction(max_failed_fraction: float) -> None:
    if not 0 <= max_failed_fraction <= 1:
        raise ValueError(f"max_failed_fraction must be from 0 to 1, got {max_failed_fraction}")


def _shared(settings: JobSettings) -> dict[str, Any]:
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(JobSettings)}


@dataclass(frozen=True, kw_only=True)
class RetrySettings:
    """Run the rows of an output that are not ok once more, and read its partial shards again."""

    output: str
    """Folder or URI of an earlier run."""
    input: tuple[str, ...] = ()
    """The input again, where its URIs hold passwords or options: those are not kept in the output."""
    max_failed_fraction: float = 0.0
    """Exit status 2 when a larger share of all rows has still failed."""
    image_cpu_s: float | None = None
    """Most CPU seconds for one image from now on; default: as in the earlier run."""
    image_wall_s: float | None = None
    """Most seconds by the clock for one image from now on; default: as in the earlier run."""
    image_memory_bytes: int | None = None
    """Address space of a decoding process from now on; default: as in the earlier run."""
    placement: Placement = field(default=Placement())
    """actors"""

    def __post_init__(self) -> None:
        _require_fraction(self.max_failed_fraction)
        self.limits(ImageLimits())

    def limits(self, before: ImageLimits) -> ImageLimits:
        """Those of the earlier run, but for what is given anew: no part of a fingerprint.

        Raises:
            ValueError: a limit is not above 0.
        """
        anew: dict[str, Any] = {
            "cpu_s": self.image_cpu_s,
            "wall_s": self.image_wall_s,
            "memory_bytes": self.image_memory_bytes,
        }
        return dataclasses.replace(before, **{name: x for name, x in anew.items() if x is not None})


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Say what a run has made: failures and their reasons, lengths, repeated captions. Needs no Ray."""

    output: str
    """Folder or URI of a run."""
    html: str | None = None
    """File for a page with all of it and sample rows, which needs nothing else to be looked at."""
    thumbnails: int = 24
    """Most sample rows whose picture is read again from the input for the page."""

    def __post_init__(self) -> None:
        if self.thumbnails < 0:
            raise ValueError(f"thumbnails must be at least 0, got {self.thumbnails}")


@dataclass(frozen=True, kw_only=True)
class StatusSettings:
    """Say what an output holds: done, failed by status, left, and when it will end. Needs no Ray."""

    output: str
    """Folder or URI of a run, finished or at work."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a plan is told beside what its job is told."""

    output: str = ""
    """Folder or URI in which writing is timed; nothing stays there. Default: a folder of this machine."""
    sample: int = 64
    """Rows to read, decode, caption and write."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        if self.sample < 1:
            raise ValueError(f"sample must be at least 1, got {self.sample}")


@dataclass(frozen=True, kw_only=True)
class PlanSettings(PlanOptions, CaptionSettings):
    """Say what a caption command would take: time, workers, bottleneck, bytes. Samples; needs no Ray."""


@dataclass(frozen=True, kw_only=True)
class PlanEmbedSettings(PlanOptions, EmbedSettings):
    """Say what an embed command would take."""


@dataclass(frozen=True, kw_only=True)
class PlanScoreSettings(PlanOptions, ScoreSettings):
    """Say what a score command would take."""


AnyPlanSettings = PlanSettings | PlanEmbedSettings | PlanScoreSettings


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


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """A frozen dataclass from plain values, with the dataclasses inside it.

    Raises:
        ValueError: a name is unknown.
    """
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    renamed = {old: name for name, field in fields.items() for old in former_names(field)}
    values = {renamed.get(name, name): value for name, value in values.items()}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"settings must be those of this version, got unknown {', '.join(unknown)}")
    hints = typing.get_type_hints(cls)
    return cls(
        **{
            name: from_dict(hints[name], value)
            if dataclasses.is_dataclass(hints[name])
            else (tuple(value) if isinstance(value, list) else value)
            for name, value in values.items()
        }
    )
