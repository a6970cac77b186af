"""`pipeline.caption`: the decode and the caption stage on any Ray Dataset with a column of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pyarrow as pa
import ray
from ray.data import Dataset, Schema

from blip2_actor import EngineBuilder, EngineConfig, GenerationOptions, ImageLimits
from pipeline.column_names import refuse_taken_names
from pipeline.fetching.fetch_settings import FetchSettings
from pipeline.inputs.reader import ADDRESS
from pipeline.placement.cluster import look_at_cluster
from pipeline.placement.own_accelerator import use_own_accelerator
from pipeline.placement.reservations import reserve, resolve_engine
from pipeline.run.cluster import start_ray
from pipeline.settings.caption_spec import CaptionSpec
from pipeline.settings.outputs import EmbedKind, Outputs, ScoreKind
from pipeline.settings.placement import Placement
from pipeline.stages.caption import CaptionStage
from pipeline.stages.decode import PIXELS, TRUNCATED
from pipeline.stages.image_column import require_images, require_text
from pipeline.stages.pools import caption_pool, decode


def caption(
    ds: Dataset,
    engine: EngineBuilder = EngineConfig(),
    options: GenerationOptions = GenerationOptions(),
    *,
    image_column: str = "image",
    prompt: str | None = None,
    prompt_column: str | None = None,
    asks: Mapping[str, str] | None = None,
    embeds: Mapping[str, EmbedKind] | None = None,
    scores: Mapping[str, str] | None = None,
    score_model: str | None = None,
    score_revision: str | None = None,
    score_kind: ScoreKind | None = None,
    regenerate: bool = False,
    calibration: str | None = None,
    min_confidence: float = 0.0,
    reuse_identical: bool = False,
    placement: Placement = Placement(),
    limits: ImageLimits = ImageLimits(),
    fetch: FetchSettings | None = None,
) -> Dataset:
    """Add captions to a dataset, lazily. Every row is kept; a bad image gets a status instead of a caption.

    Args:
        ds: a dataset with a column of images.
        engine: the model and where it runs.
        options: how texts are generated.
        image_column: encoded bytes, the `datasets` library's struct of bytes and path, PIL images, or arrays
            of the layouts that `blip2_actor.array_to_rgb` takes. Call `ray.data.read_images` with
            mode="RGB": without a mode it gives a palette image as gray, and CMYK as RGBA.
        prompt: text that every caption continues; None for plain captions.
        prompt_column: column with the prompt of each row, instead of `prompt`.
        asks: new text columns, and the prompts whose answers they hold.
        embeds: new columns of vectors, and their kinds: "vision", "qformer" or "queries".
        scores: new columns of log-probabilities, and the texts that are scored: "caption", the name of an
            ask, or a column.
        score_model: retrieval checkpoint that computes the scores instead of the language model.
        score_revision: commit, tag or branch of the retrieval checkpoint on the hub.
        score_kind: score of the retrieval checkpoint: "itm" (probability of a match, the default) or "itc"
            (cosine).
        regenerate: caption an image again if the quality check sets `flags` on its caption.
        calibration: file of `blip2 calibrate`; adds the column confidence, the probability that the caption
            is right.
        min_confidence: set the flag `abstained` on captions whose confidence is lower.
        reuse_identical: generate the texts of identical images once per actor.
        placement: how many actors run, and on what.
        limits: what decoding one image may cost.
        fetch: how images are fetched; the column may then hold URLs or paths as text. By default, web
            addresses are refused. A host is asked only if its address is public, or if it is one of
            `allow_private_hosts`.

    Returns:
        The dataset with all its columns, and the new columns caption, logprob, num_tokens, finish_reason,
        flags, status, error, width, height and sha256 (as hex digits), followed by the named columns. If
        `options.num_return_sequences` is above 1, captions and logprobs are added too. All outputs of an
        image share one pass of the vision encoder. As after every stage of Ray Data, rows may come in
        another order.

    Raises:
        ValueError: the model is unknown, a column is missing or cannot hold images, or a column has the
            name of a new one.
        TypeError: an argument is of another type.

    Examples:
        >>> from pathlib import Path
        >>> import ray, pipeline
        >>> from blip2_actor import EngineConfig
        >>> ds = ray.data.from_items([{"image": path.read_bytes()} for path in Path("pictures").iterdir()])
        >>> captioned = pipeline.caption(ds, EngineConfig(model="demo"))
        >>> captioned.select_columns(["caption", "status"]).show()
    """
    _check_types(ds, engine, options, asks=asks, embeds=embeds, scores=scores)
    outputs = Outputs.of(
        asks,
        embeds,
        scores,
        score_model=score_model,
        score_revision=score_revision,
        score_kind=score_kind,
        regenerate=regenerate,
        calibration=calibration,
        min_confidence=min_confidence,
    )
    spec = CaptionSpec(
        engine=engine,
        options=options,
        image_column=image_column,
        prompt=prompt,
        prompt_column=prompt_column,
        outputs=outputs,
        calibration=outputs.read_calibration(),
        reuse_identical=reuse_identical,
        limits=limits,
        fetch=fetch,
    )
    return add_results(ds, spec, placement)


def add_results(ds: Dataset, spec: CaptionSpec, placement: Placement) -> Dataset:
    """Add what a spec asks for to a dataset, lazily; starts or joins Ray.

    Raises:
        ValueError: as `caption`.
    """
    info = spec.engine.info()
    spec = spec.resolved(info)
    spec.check(info)
    _check_columns(ds.schema(), spec)
    if not ray.is_initialized():
        start_ray()
    reservations = reserve(placement, look_at_cluster(), spec.engine)
    decoded = decode(ds, spec, info.image_size_px, reservations, keeps_image=True)
    resolved = dataclasses.replace(spec, engine=resolve_engine(spec.engine, reservations))
    return decoded.map_batches(
        DatasetStage,
        fn_constructor_args=(resolved, reservations.caption.accelerators),
        **caption_pool(placement, reservations),
    )


def _check_types(ds: object, engine: object, options: object, **named: object) -> None:
    """Refuse what is no dataset, no configuration of an engine, no options, or names no columns."""
    if not isinstance(ds, Dataset):
        raise TypeError(
            f"ds must be a ray.data.Dataset, got {type(ds).__name__}; make one with ray.data.from_items, "
            "from_pandas, from_huggingface or read_parquet"
        )
    if not hasattr(engine, "build"):
        raise TypeError(
            f"engine must be a configuration, such as EngineConfig(model='demo'), from which each worker "
            f"builds an engine, got {type(engine).__name__}"
        )
    if not isinstance(options, GenerationOptions):
        raise TypeError(f"options must be GenerationOptions, got {type(options).__name__}")
    for name, columns in named.items():
        if not isinstance(columns, Mapping | None):
            raise TypeError(f"{name} must be a dictionary of new columns, got {type(columns).__name__}")


class DatasetStage(CaptionStage):
    """Captions the tables of a dataset; the digests are text, because JSON has no bytes."""

    def __init__(self, spec: CaptionSpec, accelerators: Mapping[str, float]) -> None:
        use_own_accelerator(spec.engine, accelerators)
        super().__init__(spec)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = super().__call__(table)
        digests = pa.array([digest and digest.hex() for digest in rows["sha256"].to_pylist()], pa.string())
        return rows.set_column(rows.column_names.index("sha256"), "sha256", digests)


def _check_columns(schema: Schema | None, spec: CaptionSpec) -> None:
    """Refuse a spec that reads a column that is missing or of a wrong type, or adds one that exists."""
    types = {} if schema is None else dict(zip(schema.names, schema.types, strict=True))
    columns = list(types)
    read = [("image_column", spec.image_column), ("prompt_column", spec.prompt_column)]
    read += [("scores", name) for name in spec.outputs.text_columns]
    for argument, name in read:
        if name is not None and name not in columns:
            raise ValueError(f"{argument} must be one of {', '.join(columns)}, got {name!r}")
    if types:
        require_images(spec.image_column, types[spec.image_column], spec.fetch is not None)
        for argument, name in read[1:]:
            if name is not None:
                require_text(argument, name, types[name])
    spec.outputs.refuse_taken(columns)
    added = [field.name for field in spec.result_fields]
    refuse_taken_names(columns, [*added, PIXELS, TRUNCATED, ADDRESS], "dataset")
