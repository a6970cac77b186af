"""`Outputs`: the columns that are made of each image in one pass of the vision encoder.

These are the caption, and columns that users name: answers to prompts ("ask"), vectors ("embed") and scores.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from blip2_actor import Calibration, EngineBuilder, MatchingConfig, ModelInfo
from blip2_actor.flags import written_as
from blip2_actor.inputs.field_types import require_types
from pipeline.column_names import COLUMN_NAMES, refuse_taken_names
from pipeline.storage.secrets import without_secrets

if TYPE_CHECKING:
    import pyarrow as pa

EmbedKind = Literal["vision", "qformer", "queries"]
ScoreKind = Literal["itm", "itc"]
CAPTION = "caption"
CONFIDENCE = "confidence"
"""Column with the probability that the caption is right; only with a calibration."""
SHARED_WITH_SCORE_MODEL = ("device", "dtype", "num_threads")
"""Options of the engine that a retrieval checkpoint takes too."""
FORMS = {"ask": "NAME=PROMPT", "embed": "NAME=KIND", "score": "NAME=COLUMN"}
"""The form of each field that names columns."""


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Whether captions are made, and the named columns, which follow the columns of the row contract."""

    caption: bool = True
    """Whether captions are made."""
    ask: tuple[str, ...] = field(default=(), metadata=written_as(FORMS["ask"]))
    """Text column NAME with the answer to its own prompt, such as
    color="Question: what color is it? Answer:"."""
    embed: tuple[str, ...] = field(default=(), metadata=written_as(FORMS["embed"]))
    """Column NAME of float32 vectors; KIND is vision (pooled output of the vision encoder),
    qformer (mean of the Q-Former's queries) or queries (every query)."""
    score: tuple[str, ...] = field(default=(), metadata=written_as(FORMS["score"]))
    """float32 column NAME with the natural log of the probability of a text, given the image and the prompt;
    COLUMN is "caption", the name of an ask, or a column or member of the input."""
    score_model: str | None = None
    """Retrieval checkpoint, such as Salesforce/blip2-itm-vit-g, that computes the scores instead of the
    language model."""
    score_revision: str | None = None
    """Commit, tag or branch of the retrieval checkpoint on the hub; pin it for reproducible scores."""
    score_kind: ScoreKind | None = None
    """Score of a retrieval checkpoint: itm is the probability that image and text match, itc the cosine of
    their contrastive embeddings; default: itm."""
    regenerate: bool = False
    """If the quality check sets `flags` on a caption, generate it again with penalties for repetition."""
    calibration: str | None = None
    """File of blip2 calibrate, or its URI: adds the column confidence, the probability that the caption is
    right."""
    min_confidence: float = 0.0
    """Set the flag `abstained` on captions whose confidence is lower, from 0 to 1; they stay in the
    output."""

    def __post_init__(self) -> None:
        require_types(self)
        for flag, form in FORMS.items():
            for entry in getattr(self, flag):
                name, separator, value = entry.partition("=")
                if not (name and separator and value):
                    raise ValueError(f"{flag} must be {form}, got {entry!r}")
        for name, kind in self.embeds.items():
            if kind not in get_args(EmbedKind):
                raise ValueError(
                    f"embed must be NAME=KIND with one of {', '.join(get_args(EmbedKind))}, got {name}={kind}"
                )
        if self.score_model and not self.score:
            raise ValueError("score_model must be left out without score; add --score NAME=COLUMN")
        for name in ("score_revision", "score_kind"):
            if getattr(self, name) and not self.score_model:
                raise ValueError(f"{name} must be left out without score_model; add --score-model")
        if self.regenerate and not self.caption:
            raise ValueError("regenerate must be left out if no captions are made")
        self._check_confidence()
        if not (self.caption or self.names):
            raise ValueError("outputs must name at least one column, got none")
        self.refuse_taken(COLUMN_NAMES)

    def _check_confidence(self) -> None:
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"min_confidence must be from 0 to 1, got {self.min_confidence}")
        if self.calibration is None:
            if self.min_confidence:
                raise ValueError("min_confidence must be left out without calibration; add --calibration")
            return
        if not self.caption:
            raise ValueError("calibration must be left out if no captions are made")
        if "://" not in self.calibration:  # The run stores it, and may go on from another folder.
            object.__setattr__(self, "calibration", os.path.abspath(self.calibration))

    @classmethod
    def of(
        cls,
        asks: Mapping[str, str] | None = None,
        embeds: Mapping[str, EmbedKind] | None = None,
        scores: Mapping[str, str] | None = None,
        **others: Any,
    ) -> Outputs:
        """Make outputs from mappings of a column's name to what the column holds."""
        ask, embed, score = (
            tuple(f"{name}={value}" for name, value in (mapping or {}).items())
            for mapping in (asks, embeds, scores)
        )
        return cls(ask=ask, embed=embed, score=score, **others)

    @property
    def asks(self) -> dict[str, str]:
        """Prompts by column."""
        return _pairs(self.ask)

    @property
    def embeds(self) -> dict[str, str]:
        """Kinds by column."""
        return _pairs(self.embed)

    @property
    def scores(self) -> dict[str, str]:
        """Sources of the scored texts by column."""
        return _pairs(self.score)

    @property
    def names(self) -> list[str]:
        """The names that users have given, in the order of the columns."""
        return [entry.partition("=")[0] for entry in (*self.ask, *self.embed, *self.score)]

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Columns of the input whose texts are scored."""
        made = {*self.asks, *([CAPTION] if self.caption else [])}
        return tuple(dict.fromkeys(source for source in self.scores.values() if source not in made))

    def read_calibration(self) -> Calibration | None:
        """Return the calibration of the captions, or None without one.

        Raises:
            ValueError: its file cannot be read.
        """
        from pipeline.storage.retrying_file import read_file  # --help does not need pyarrow

        if self.calibration is None:
            return None
        return Calibration.parse(read_file("calibration", self.calibration), self.calibration)

    @property
    def stored(self) -> Outputs:
        """The outputs as a run stores them: URIs without passwords and options."""
        if self.calibration is None:
            return self
        return replace(self, calibration=without_secrets(self.calibration))

    @property
    def confidence_parts(self) -> dict[str, Any] | None:
        """The calibration's part of a run's fingerprint; None without a calibration."""
        calibration = self.read_calibration()
        if calibration is None:
            return None
        return {"calibration": calibration.digest, "min_confidence": self.min_confidence}

    @property
    def only_matches(self) -> bool:
        """Whether a retrieval checkpoint makes every output, so that no language model is loaded."""
        return self.score_model is not None and not (self.caption or self.ask or self.embed)

    def matching(self, engine: EngineBuilder) -> MatchingConfig | None:
        """Return the retrieval checkpoint, with device, dtype and threads of the engine; None without one."""
        if self.score_model is None:
            return None
        shared = {name: getattr(engine, name) for name in SHARED_WITH_SCORE_MODEL if hasattr(engine, name)}
        return MatchingConfig(model=self.score_model, revision=self.score_revision, **shared)

    def score_digest(self, engine: EngineBuilder, info: ModelInfo) -> str | None:
        """Return the digest of the retrieval checkpoint's content, or None without such a checkpoint.

        Args:
            info: the model for whose image size images are decoded.

        Raises:
            ValueError: the checkpoint takes images of another size.
        """
        matching = self.matching(engine)
        if matching is None:
            return None
        found = matching.info()
        if found.image_size_px != info.image_size_px:
            raise ValueError(
                f"score_model must take images of {info.image_size_px} px as the model does, got "
                f"{found.image_size_px} px; compute the scores in a separate run with blip2 score"
            )
        return found.digest

    @property
    def parts(self) -> dict[str, Any]:
        """The part of a run's fingerprint: each column, and the order of the columns."""
        return {
            "columns": [*([CAPTION] if self.caption else []), *self.names],
            "ask": self.asks,
            "embed": self.embeds,
            "score": self.scores,
            "score_kind": (self.score_kind or "itm") if self.score_model else "logprob",
            "regenerate": self.regenerate,
        }

    def refuse_taken(self, taken: Sequence[str]) -> None:
        """Raise ValueError if the name of a column is taken or is given twice."""
        taken = list(taken)
        if self.calibration is not None:
            if CONFIDENCE in taken:
                raise ValueError(
                    f"calibration adds the column {CONFIDENCE}, which is there already; rename or drop it"
                )
            taken.append(CONFIDENCE)
        for flag in FORMS:
            names = [entry.partition("=")[0] for entry in getattr(self, flag)]
            refuse_taken_names(names, taken, flag)
            taken += names

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        """The named columns with their types."""
        import pyarrow as pa  # --help does not need it

        vector = pa.list_(pa.float32())
        kinds = {"vision": vector, "qformer": vector, "queries": pa.list_(vector)}
        return (
            *([] if self.calibration is None else [pa.field(CONFIDENCE, pa.float32())]),
            *(pa.field(name, pa.string()) for name in self.asks),
            *(pa.field(name, kinds[kind]) for name, kind in self.embeds.items()),
            *(pa.field(name, pa.float32()) for name in self.scores),
        )


def _pairs(entries: Sequence[str]) -> dict[str, str]:
    return {name: value for name, _, value in (entry.partition("=") for entry in entries)}
