"""The settings of a job: one frozen dataclass per command, which also defines the command's flags.

Captions, embeddings and scores are one job, `CaptionSettings`, with different outputs: `job()` of the other
two commands returns it. `CaptionSettings` decides the fingerprint of a run and is stored in its `run.json`.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from blip2_actor import EngineBuilder, EngineConfig, GenerationOptions, ImageLimits, ModelInfo
from blip2_actor.flags import hiding, positional, prefixed, written_as
from blip2_actor.inputs.field_types import require_types
from pipeline.column_names import COLUMN_NAMES, refuse_taken_names
from pipeline.endpoint.settings import EndpointSettings
from pipeline.fetching.fetch_settings import FetchSettings
from pipeline.inputs.globs import Patterns
from pipeline.inputs.reader import PROMPT, TEXT, ReadOptions
from pipeline.inputs.shards import RunSlice, without_secrets
from pipeline.settings.caption_spec import CaptionSpec
from pipeline.settings.deadline import stop_time
from pipeline.settings.fingerprint import ADDED_LATER, GENERATION_CONFIG, STATUSES, Fingerprint
from pipeline.settings.from_dict import to_dict
from pipeline.settings.outputs import FORMS, SHARED_WITH_SCORE_MODEL, Outputs, ScoreKind
from pipeline.settings.placement import Placement

NO_TEXT = hiding("allow_urls", "ignore_generation_config")
"""Hides what has no effect on an engine that generates no text."""
NO_FLAGS = ("max_image_bytes", "table_rows", "table_bytes", "text_columns", "schema_version")
"""Fields of `ReadOptions` that users cannot set."""
OF_ONE_START = ("add_new", "deadline", "redo_changed", "slice", "serving")
"""Settings that are not stored, because they are meant for one start of a run."""


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """Settings that every job over an input has: input, output, model and actors."""

    input: tuple[str, ...] = field(metadata=positional())
    """Tar files, Parquet files, folders, globs and {00..99} ranges; local, or URIs such as s3:// and gs://.
    @FILE is a text file, CSV or JSON lines that names images, or a text file that names tars or tables."""
    output: str
    """Folder or URI for the results; the state of the run is kept in its subfolder _blip2."""
    format: Literal["auto", "webdataset", "parquet", "folder"] = "auto"
    """Kind of input, if the file names leave doubt."""
    include: tuple[str, ...] = ()
    """Read only files whose name, or path if the pattern has a slash, matches a pattern such as '*.jpg'."""
    exclude: tuple[str, ...] = ()
    """Leave out files whose name, or path if the pattern has a slash, matches, such as '**/masks/**'."""
    limit: int | None = None
    """Process only the first N rows; default: all."""
    max_failed_fraction: float = 0.0
    """Exit with status 2 if a larger fraction of the rows fails. The job stops early if more than half of the
    rows fail, or more than this fraction if it is above one half."""
    max_flagged_fraction: float = 1.0
    """Exit with status 2 if a larger fraction of the captions is flagged (empty, looping or echoing the
    prompt), or if most captions are the same; 1 means that flags do not count."""
    deadline: str | None = None
    """When the job must have ended: a duration such as 2h30m, or a UTC time such as 2026-01-31T18:00. It
    stops in time to write what is finished, and the same command resumes it."""
    fork: bool = False
    """If the output was started with other settings, start a new output next to it."""
    add_new: bool = False
    """Also process files that have come to the input since the output was started; finished files stay."""
    redo_changed: bool = False
    """Make all rows of a shard again if its input has changed since the output was started."""
    slice: str | None = None
    """Work on one part of the shards, such as 2/8, while other commands work on the others of this output."""
    engine: EngineConfig = field(default=EngineConfig(), metadata=hiding("allow_urls"))
    """model and device"""
    reading: ReadOptions = field(default=ReadOptions(), metadata=hiding(*NO_FLAGS))
    """columns and members"""
    limits: ImageLimits = field(default=ImageLimits(), metadata=prefixed("image"))
    """limits for one image"""
    fetching: FetchSettings = field(default=FetchSettings())
    """fetching images by address"""
    placement: Placement = field(default=Placement())
    """actors"""

    def __post_init__(self) -> None:
        require_types(self)
        if not self.input:
            raise ValueError("input must name at least one file or folder, got none")
        require_fraction("max_failed_fraction", self.max_failed_fraction)
        require_fraction("max_flagged_fraction", self.max_flagged_fraction)
        stop_time(self.deadline)  # validates
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")
        if self.add_new and self.limit is not None:
            raise ValueError("add_new must be left out with limit, which takes the first rows of the input")
        if self.run_slice is not None and (self.add_new or self.redo_changed or self.fork):
            raise ValueError("slice must be left out with add_new, redo_changed and fork; run these alone")
        refuse_taken_names(list(self.reading.kept), COLUMN_NAMES, "keep")
        self.placement.check(self.engine.device)

    @property
    def run_slice(self) -> RunSlice | None:
        """The part of the shards that is worked on; None means all."""
        return None if self.slice is None else RunSlice.parse(self.slice)


@dataclass(frozen=True, kw_only=True)
class CaptionSettings(JobSettings):
    """Caption every image of an input into Parquet files, one per shard; run again to resume."""

    prompt: str | None = None
    """Text that every caption continues, such as "Question: what is this? Answer:"; default: no prompt."""
    reuse_identical: bool = False
    """Generate the texts of identical images once per actor; this does not change the rows."""
    outputs: Outputs = field(default=Outputs(), metadata=hiding("caption"))
    """more outputs from the same pass of the vision encoder"""
    generation: GenerationOptions = field(default=GenerationOptions())
    """generation"""
    serving: EndpointSettings = field(default=EndpointSettings())
    """captions by a running endpoint"""

    def __post_init__(self) -> None:
        super().__post_init__()
        CaptionSpec(prompt=self.prompt, prompt_column=self.reading.prompt_column)  # validates
        self.outputs.refuse_taken([*COLUMN_NAMES, *self.reading.kept])

    def job(self) -> CaptionSettings:
        """Return the job itself, as `job()` of the other commands does."""
        return self

    @property
    def builder(self) -> EngineBuilder:
        """Builds the engine that the outputs need: of the captioning model or of the retrieval checkpoint."""
        if (remote := self.serving.config) is not None:
            return replace(remote, ignore_generation_config=self.engine.ignore_generation_config)
        if self.outputs.only_matches:
            return typing.cast(EngineBuilder, self.outputs.matching(self.engine))
        if not self.outputs.caption and not self.outputs.ask:  # no text is generated
            return replace(self.engine, ignore_generation_config=True)
        return self.engine

    def spec(self, engine: EngineBuilder | None = None) -> CaptionSpec:
        """Return the spec of the caption stage for the tables that the readers of this job yield.

        Args:
            engine: replaces the engine of these settings.

        Raises:
            ValueError: settings contradict each other.
        """
        return CaptionSpec(
            engine=self.builder if engine is None else engine,
            options=self.generation,
            prompt=self.prompt,
            prompt_column=None if self.reading.prompt_column is None else PROMPT,
            outputs=self.outputs,
            calibration=self.outputs.read_calibration(),
            reuse_identical=self.reuse_identical,
            limits=self.limits,
            fetch=self.fetching,
            text_prefix=TEXT,
        )

    def in_version(self, schema_version: int) -> CaptionSettings:
        """Return the same job with rows of another version of the row contract."""
        return replace(self, reading=replace(self.reading, schema_version=schema_version))

    @property
    def patterns(self) -> Patterns:
        """Which files of the input are read."""
        return Patterns(self.include, self.exclude)

    def resolved(self, info: ModelInfo) -> CaptionSettings:
        """Return the settings with a value for every option of generation; see `CaptionSpec.resolved`."""
        engine = self.serving.of_model(self.engine, info)
        options = self.generation.resolve(info.generation_config)
        return replace(self, engine=engine, generation=options)

    def without_generation_config(self) -> CaptionSettings:
        """Return the settings of a run that does not read the checkpoint's `generation_config.json`."""
        return replace(self, engine=replace(self.engine, ignore_generation_config=True))

    @property
    def read_options(self) -> ReadOptions:
        """What the readers do: skip image files that decoding would refuse by size, read texts to score."""
        max_bytes, texts = self.limits.max_file_bytes, self.outputs.text_columns
        return replace(self.reading, max_image_bytes=max_bytes, text_columns=texts)

    def fingerprint(self, info: ModelInfo) -> Fingerprint:
        """Return everything that decides what the rows say; limits of time and memory do not."""
        limits, reading = self.limits, self.reading
        parts = {
            "input": [without_secrets(uri) for uri in self.input],
            "format": self.format,
            "limit": self.limit,
            "include": self.include,
            "exclude": self.exclude,
            "model": info.digest,
            "dtype": info.dtype,
            "quantize": self.engine.quantize,
            "prompt": self.prompt,
            "options": dataclasses.asdict(self.generation.resolve(info.generation_config)),
            GENERATION_CONFIG: info.generation_config,
            "outputs": self.outputs.parts,
            "confidence": self.outputs.confidence_parts,
            "score_model": self.outputs.score_digest(self.engine, info),
            "image": {
                "size_px": info.image_size_px,
                "max_pixels": limits.max_pixels,
                "max_file_bytes": limits.max_file_bytes,
                "jpeg_draft": limits.jpeg_draft,
                "accept_truncated": limits.accept_truncated,
            },
            "columns": {
                "image": reading.image_column,
                "fetch": reading.fetch,
                "encoding": reading.image_encoding,
                "key": reading.key_column,
                "prompt": reading.prompt_column,
                "keep": reading.keep,
            },
            "schema": {"version": reading.schema_version, "statuses": list(STATUSES)},
        }
        return Fingerprint.of(parts, ADDED_LATER)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without secrets; `from_dict` turns them back into settings."""
        inputs, output = tuple(map(without_secrets, self.input)), without_secrets(self.output)
        values = to_dict(replace(self, input=inputs, output=output, outputs=self.outputs.stored))
        del values["reading"]["schema_version"]  # It is in the fingerprint.
        return {name: value for name, value in values.items() if name not in OF_ONE_START}


@dataclass(frozen=True, kw_only=True)
class EmbedSettings(JobSettings):
    """Embed every image of an input into Parquet files; no text is written. Run again to resume."""

    embed: tuple[str, ...] = field(default=("embedding=qformer",), metadata=written_as(FORMS["embed"]))
    """Column NAME of float32 vectors; KIND is vision (pooled output of the vision encoder),
    qformer (mean of the Q-Former's queries) or queries (every query)."""
    engine: EngineConfig = field(default=EngineConfig(), metadata=NO_TEXT)
    """model and device"""
    reading: ReadOptions = field(default=ReadOptions(), metadata=hiding(*NO_FLAGS, "prompt_column"))
    """columns and members"""

    def job(self) -> CaptionSettings:
        """Return the job that makes the vectors and no captions."""
        return CaptionSettings(**_shared(self), outputs=Outputs(caption=False, embed=self.embed))


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(JobSettings):
    """Score how well a text fits its image, for every row of an input. Run again to resume."""

    text_column: str
    """Column with the text, or extension of the member that holds it; a row without a text has no score."""
    name: str = "score"
    """Column of the output with the score."""
    prompt: str | None = None
    """Text between image and scored text, such as the question whose answer is scored; default: none."""
    score_model: str | None = None
    """Retrieval checkpoint, such as Salesforce/blip2-itm-vit-g, that computes the scores; no other model is
    loaded. Default: the score is the log-probability that the language model of --model gives the text."""
    score_revision: str | None = None
    """Commit, tag or branch of the retrieval checkpoint on the hub; pin it for reproducible scores."""
    score_kind: ScoreKind | None = None
    """Score of a retrieval checkpoint: itm is the probability that image and text match, itc the cosine of
    their contrastive embeddings; default: itm."""
    engine: EngineConfig = field(default=EngineConfig(), metadata=NO_TEXT)
    """model and device"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score_model is None:
            return
        for name, value in (("prompt", self.prompt), ("prompt_column", self.reading.prompt_column)):
            if value is not None:
                raise ValueError(f"{name} must be left out with score_model, which reads only the text")
        options = [f.name for f in dataclasses.fields(EngineConfig) if f.name not in SHARED_WITH_SCORE_MODEL]
        for name in options:
            if getattr(self.engine, name) != getattr(EngineConfig(), name):
                raise ValueError(f"{name} must be left out with score_model, the only model that is loaded")

    def job(self) -> CaptionSettings:
        """Return the job that makes the scores and no captions."""
        model = {f"score_{name}": getattr(self, f"score_{name}") for name in ("model", "revision", "kind")}
        outputs = Outputs(caption=False, score=(f"{self.name}={self.text_column}",), **model)
        return CaptionSettings(**_shared(self), prompt=self.prompt, outputs=outputs)


def require_fraction(name: str, value: float) -> None:
    """Raise ValueError unless the value is a fraction."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be from 0 to 1, got {value}")


def _shared(settings: JobSettings) -> dict[str, Any]:
    """Return the settings that every job has."""
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(JobSettings)}
