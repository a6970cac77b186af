"""What is made of each image in one pass of the vision encoder: the caption, and columns that users name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from blip2_actor import EngineBuilder, GenerationOptions, MatchingConfig, ModelInfo
from blip2_actor.flags import written_as
from pipeline.column_names import COLUMN_NAMES, refuse_taken_names

if TYPE_CHECKING:
    import pyarrow as pa

EmbedKind = Literal["vision", "qformer", "queries"]
ScoreKind = Literal["itm", "itc"]
CAPTION = "caption"
SHARED_WITH_SCORE_MODEL = ("device", "dtype", "num_threads")
"""Of the engine's options: those that a retrieval checkpoint takes too."""
FORMS = {"ask": "NAME=PROMPT", "embed": "NAME=KIND", "score": "NAME=COLUMN"}
"""How the fields are written that name columns."""


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """The caption or not, and named columns behind the columns of the contract: answers, vectors, scores."""

    caption: bool = True
    """Whether captions are made."""
    ask: tuple[str, ...] = field(default=(), metadata=written_as(FORMS["ask"]))
    """A text column with the answer to a prompt of its own, such as
    colour="Question: what colour is it? Answer:"."""
    embed: tuple[str, ...] = field(default=(), metadata=written_as(FORMS["embed"]))
    """A column of float32 vectors; KIND is vision (the vision encoder's pooled output),
    qformer (the mean of the Q-Former's queries) or queries (every query)."""
    score: tuple[str, ...] = field(default=(), metadata=written_as(FORMS["score"]))
    """A float32 column, how probable (natural log) a text is behind the image and the prompt:
    that of "caption", of an ask, or of a column or member of the input."""
    score_model: str | None = None
    """Retrieval checkpoint, such as Salesforce/blip2-itm-vit-g, that computes the scores instead."""
    score_revision: str | None = None
    """Commit, tag or branch of it on the hub; pin it for reproducible scores."""
    score_kind: ScoreKind | None = None
    """Of a retrieval checkpoint: itm is the probability that image and text match, itc the cosine of their
    contrastive embeddings; default: itm."""
    regenerate: bool = False
    """Caption once more, with penalties for repetition, where the guard marks a caption in `flags`."""

    def __post_init__(self) -> None:
        for flag, form in FORMS.items():
            entries = tuple(getattr(self, flag))
            object.__setattr__(self, flag, entries)
            for entry in entries:
                name, separator, value = entry.partition("=")
                if not (name and separator and value):
                    raise ValueError(f"{flag} must be {form}, got {entry!r}")
        for name, kind in self.embeds.items():
            if kind not in get_args(EmbedKind):
                raise ValueError(
                    f"embed must be NAME=KIND with one of {', '.join(get_args(EmbedKind))}, got {name}={kind}"
                )
        if self.score_model and not self.score:
            raise ValueError("score_model must be left out without score, got it alone; add --score")
        for name in ("score_revision", "score_kind"):
            if getattr(self, name) and not self.score_model:
                raise ValueError(f"{name} must be left out without score_model; name a retrieval checkpoint")
        if self.regenerate and not self.caption:
            raise ValueError("regenerate must be left out without captions")
        if not (self.caption or self.names):
            raise ValueError("outputs must name at least one column, got none")
        self.refuse_taken(COLUMN_NAMES)

    @classmethod
    def of(
        cls,
        asks: Mapping[str, str] | None = None,
        embeds: Mapping[str, EmbedKind] | None = None,
        scores: Mapping[str, str] | None = None,
        **others: Any,
    ) -> Outputs:
        """From mappings of a column's name to what it holds."""
        ask, embed, score = (
            tuple(f"{name}={value}" for name, value in (mapping or {}).items())
            for mapping in (asks, embeds, scores)
        )
        return cls(ask=ask, embed=embed, score=score, **others)

    @property
    def asks(self) -> dict[str, str]:
        """Column to prompt."""
        return _pairs(self.ask)

    @property
    def embeds(self) -> dict[str, str]:
        """Column to kind."""
        return _pairs(self.embed)

    @property
    def scores(self) -> dict[str, str]:
        """Column to where its text stands."""
        return _pairs(self.score)

    @property
    def names(self) -> list[str]:
        """The named columns, in order."""
        return [entry.partition("=")[0] for entry in (*self.ask, *self.embed, *self.score)]

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Columns of the input whose texts are scored."""
        made = {*self.asks, *([CAPTION] if self.caption else [])}
        return tuple(dict.fromkeys(source for source in self.scores.values() if source not in made))

    @property
    def only_matches(self) -> bool:
        """Whether a retrieval checkpoint makes everything there is, so that no language model is loaded."""
        return self.score_model is not None and not (self.caption or self.ask or self.embed)

    def matching(self, engine: EngineBuilder) -> MatchingConfig | None:
        """The retrieval checkpoint, in place and dtype as the engine."""
        if self.score_model is None:
            return None
        shared = {name: getattr(engine, name) for name in SHARED_WITH_SCORE_MODEL if hasattr(engine, name)}
        return MatchingConfig(model=self.score_model, revision=self.score_revision, **shared)

    def check(
        self, engine: EngineBuilder, info: ModelInfo, prompt: str | None, options: GenerationOptions
    ) -> None:
        """Refuse, before any work is begun, what no row could be served with.

        Raises:
            ValueError: the model cannot take a prompt that every row would have, or as from `score_digest`.
        """
        self.score_digest(engine, info)
        prompts = [text for text in (prompt, *self.asks.values()) if text]
        if prompts:
            engine.check_prompts(prompts, options.max_new_tokens)

    def score_digest(self, engine: EngineBuilder, info: ModelInfo) -> str | None:
        """Identifies the retrieval checkpoint's content.

        Raises:
            ValueError: it takes images of another size than the model they are made ready for.
        """
        matching = self.matching(engine)
        if matching is None:
            return None
        found = matching.info()
        if found.image_size_px != info.image_size_px:
            raise ValueError(
                f"score_model must take images of {info.image_size_px} px as the model does, got "
                f"{found.image_size_px} px; score in a run of its own: blip2 score"
            )
        return found.digest

    @property
    def parts(self) -> dict[str, Any]:
        """What a run's fingerprint says: column by column, and their order."""
        return {
            "columns": [*([CAPTION] if self.caption else []), *self.names],
            "ask": self.asks,
            "embed": self.embeds,
            "score": self.scores,
            "score_kind": (self.score_kind or "itm") if self.score_model else "logprob",
            "regenerate": self.regenerate,
        }

    def refuse_taken(self, taken: Sequence[str]) -> None:
        """Raise ValueError where a named column has a name that is taken, or has it twice."""
        taken = list(taken)
        for flag in FORMS:
            names = [entry.partition("=")[0] for entry in getattr(self, flag)]
            refuse_taken_names(names, taken, flag)
            taken += names

    def fields(self, info: ModelInfo) -> tuple[pa.Field, ...]:
        """The named columns with their types."""
        import pyarrow as pa

        vector = pa.list_(pa.float32(), info.qformer_width)
        kinds = {
            "vision": pa.list_(pa.float32(), info.vision_width),
            "qformer": vector,
            "queries": pa.list_(vector, info.num_queries),
        }
        return (
            *(pa.field(name, pa.string()) for name in self.asks),
            *(pa.field(name, kinds[kind]) for name, kind in self.embeds.items()),
            *(pa.field(name, pa.float32()) for name in self.scores),
        )


def _pairs(entries: Sequence[str]) -> dict[str, str]:
    return {name: value for name, _, value in (entry.partition("=") for entry in entries)}
