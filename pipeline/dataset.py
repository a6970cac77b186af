"""`caption`: the two stages on anyone's Ray Dataset with a column of images."""

from __future__ import annotations

from collections.abc import Mapping

import ray
from ray.data import ActorPoolStrategy, Dataset

from blip2_actor import EngineBuilder, EngineConfig, GenerationOptions, ImageLimits
from pipeline.run.cluster import size_of_cluster
from pipeline.schema import refuse_taken_names, result_fields
from pipeline.settings.outputs import EmbedKind, Outputs, ScoreKind
from pipeline.settings.placement import Placement, Reservations, reserve, resolve_engine
from pipeline.stages.caption import CaptionStage
from pipeline.stages.decode import PIXELS, DecodeStage

GPU_CALL_ROWS = 256
"""Eight such calls keep an engine's slots full, and one is a fragment."""


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
    reuse_identical: bool = False,
    placement: Placement = Placement(),
    limits: ImageLimits = ImageLimits(),
) -> Dataset:
    """Add captions to a dataset, lazily; every row comes back, a bad image with a status.

    Args:
        image_column: encoded bytes, the `datasets` library's struct of bytes and path, or uint8[H, W, 3].
        prompt: text that every answer continues; None captions.
        prompt_column: column with each row's own prompt, instead of `prompt`.
        asks: new text columns, and the prompts whose answers they hold.
        embeds: new columns of vectors, and of which kind: "vision", "qformer" or "queries".
        scores: new columns of log-probabilities, and whose texts they are of: "caption", an ask, or a column.
        score_model: retrieval checkpoint that computes the scores instead.
        score_revision: commit, tag or branch of it on the hub.
        score_kind: of it, "itm" (probability of a match, the default) or "itc" (cosine).
        regenerate: caption once more where the guard marks a caption in `flags`.
        reuse_identical: make the texts of images whose bytes are the same once per actor.

    Returns:
        The dataset with all its columns, and caption, logprob, num_tokens, finish_reason, flags, status,
        error, width, height and sha256 (captions and logprobs too, when several texts are asked for),
        and the named columns; what has been made of an image shares one pass of the vision encoder.
        Rows may come in another order, as from every stage of Ray Data.

    Raises:
        ValueError: the model is unknown, a column is missing, or one has the name of a new column.
    """
    if prompt is not None and prompt_column is not None:
        raise ValueError("prompt_column must be alone, got prompt too; name one of them")
    info = engine.info()
    outputs = Outputs.of(
        asks,
        embeds,
        scores,
        score_model=score_model,
        score_revision=score_revision,
        score_kind=score_kind,
        regenerate=regenerate,
    )
    outputs.check(engine, info, prompt, options)
    columns = ds.columns() or []
    texts = (("scores", name) for name in outputs.text_columns)
    for flag, name in (("image_column", image_column), ("prompt_column", prompt_column), *texts):
        if name is not None and name not in columns:
            raise ValueError(f"{flag} must be one of {', '.join(columns)}, got {name!r}")
    outputs.refuse_taken(columns)
    new = [field.name for field in result_fields(outputs.caption, options.num_return_sequences)]
    refuse_taken_names(columns, [*new, PIXELS], "dataset")
    if not ray.is_initialized():
        ray.init()
    reservations = reserve(placement, size_of_cluster())
    decoded = decode(ds, info.image_size_px, limits, image_column, placement, reservations, keeps_image=True)
    return decoded.map_batches(
        CaptionStage,
        fn_constructor_args=(
            resolve_engine(engine, reservations),
            options,
            prompt,
            prompt_column,
            outputs,
            reuse_identical,
        ),
        **caption_pool(placement, reservations),
    )


def decode(
    ds: Dataset,
    size_px: int,
    limits: ImageLimits,
    image_column: str,
    placement: Placement,
    reservations: Reservations,
    **stage: object,
) -> Dataset:
    """The decode stage on a dataset, in a pool that grows and shrinks."""
    return ds.map_batches(
        DecodeStage,
        fn_constructor_args=(size_px, limits, image_column),
        fn_constructor_kwargs=stage,
        # Whole blocks: with a number, Ray would join the blocks of several shards to reach it.
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, max_size=placement.max_decode_actors),
        num_cpus=reservations.decode_cpus,
    )


def caption_pool(placement: Placement, reservations: Reservations) -> dict[str, object]:
    """How `map_batches` is to run a captioning stage: several calls at once in one actor.

    On CPUs a call takes a block. For accelerators Ray wants a number, and joins blocks to reach it.
    """
    return {
        "batch_size": GPU_CALL_ROWS if reservations.caption_gpus else None,
        "batch_format": "pyarrow",
        "compute": ActorPoolStrategy(
            min_size=placement.min_actors,
            max_size=reservations.max_actors,
            max_concurrent_calls_per_actor=placement.calls_per_actor,
            enable_true_multi_threading=True,
        ),
        "num_cpus": reservations.caption_cpus,
        "num_gpus": reservations.caption_gpus or None,
    }
