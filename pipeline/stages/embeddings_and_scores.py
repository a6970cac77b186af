"""Vectors and scores: what is computed for many finished rows at once, beside the texts.

Where the captioning engine computes them, they share its pass of the vision encoder; a retrieval
checkpoint has an engine and a vision encoder of its own.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence

import pyarrow as pa

from blip2_actor import EngineLike, Features, ImageLike, Result, Status
from pipeline.settings.outputs import CAPTION, Outputs
from pipeline.stages.row_result import PendingRow, RowResult

if typing.TYPE_CHECKING:
    import numpy as np

    from blip2_actor import MatchingEngine


class EmbeddingsAndScores:
    """The vectors and scores that a run asks for."""

    def __init__(
        self, outputs: Outputs, engine: EngineLike, beside: MatchingEngine | None, text_prefix: str
    ) -> None:
        """
        Args:
            engine: of the stage; a `MatchingEngine` where nothing but its scores is asked for.
            beside: computes the scores where a retrieval checkpoint does so beside the engine.
            text_prefix: stands before the names of the columns whose texts are scored.
        """
        self._outputs = outputs
        self._asks, self._embeds, self._scores = outputs.asks, outputs.embeds, outputs.scores
        self._engine = engine
        self._beside = beside
        self._matcher = typing.cast("MatchingEngine", engine) if outputs.only_matches else beside
        self._text_prefix = text_prefix
        self.are_wanted = bool(self._embeds or self._scores)
        self.share_the_encoder = bool(self._embeds or (self._scores and self._matcher is None))

    @property
    def busy_s(self) -> float:
        """Of the retrieval checkpoint beside the engine."""
        return self._beside.stats().busy_s if self._beside is not None else 0.0

    def close(self) -> None:
        if self._beside is not None:
            self._beside.close()

    def add(self, table: pa.Table, rows: Sequence[tuple[PendingRow, RowResult]]) -> None:
        """Fill in the vectors and scores of rows that are ok.

        A row without a text has no score; a text that cannot be scored decides the row's status.
        """
        if rows and self._embeds:
            self._embed(rows)
        if rows and self._scores:
            self._score(table, rows)

    def _embed(self, rows: Sequence[tuple[PendingRow, RowResult]]) -> None:
        found = self._engine.features([row.image for row, _ in rows if row.image is not None])
        for (_, made), features in zip(rows, found, strict=True):
            if features.status is not Status.OK:
                made.result = Result(status=features.status, error=features.error)
                continue
            for name, kind in self._embeds.items():
                vector = _vector(features, kind)
                if vector is not None:
                    made.named[name] = vector

    def _score(self, table: pa.Table, rows: Sequence[tuple[PendingRow, RowResult]]) -> None:
        images, texts, prompts, places = [], [], [], []
        for row, made in rows:
            for name, source in self._scores.items():
                text = self._text(table, row, made, source)
                if text and text.strip() and row.image is not None:
                    images.append(row.image)
                    texts.append(text)
                    prompts.append(self._asks.get(source, row.prompt))
                    places.append((made, name))
        found = self._run(images, texts, prompts)
        for (made, name), (score, status, error) in zip(places, found, strict=True):
            if score is not None:
                made.named[name] = score
            else:
                made.result = Result(status=status, error=f"{name}: {error}")

    def _run(
        self, images: Sequence[ImageLike], texts: Sequence[str], prompts: Sequence[str | None]
    ) -> list[tuple[float | None, Status, str | None]]:
        if self._matcher is None:
            scores = self._engine.score(images, texts, prompts)
            return [(score.logprob, score.status, score.error) for score in scores]
        matches = self._matcher.score(images, texts)
        if self._outputs.score_kind == "itc":
            return [(match.itc, match.status, match.error) for match in matches]
        return [(match.itm, match.status, match.error) for match in matches]

    def _text(self, table: pa.Table, row: PendingRow, made: RowResult, source: str) -> str | None:
        if source in self._asks:
            return str(made.named[source])
        if source == CAPTION and self._outputs.caption:
            return made.result.text
        text: str | None = table[self._text_prefix + source][row.position].as_py()
        return text


def _vector(features: Features, kind: str) -> np.ndarray | None:
    """float32[Dv], float32[Dq] or float32[Q, Dq], by the kind that `Outputs.embed` names."""
    if kind == "vision":
        return features.pooler_output
    queries = features.qformer_features
    return queries if queries is None or kind == "queries" else queries.mean(axis=0)
