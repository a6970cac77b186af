"""`EmbeddingsAndScores`: vectors and scores, which are computed for many finished rows at once.

If the captioning engine computes them, they share its pass of the vision encoder. A retrieval checkpoint has
its own engine and its own vision encoder.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence

import pyarrow as pa

from blip2_actor import EngineLike, EngineStats, Features, ImageLike, Result, Status
from pipeline.settings.outputs import CAPTION, Outputs
from pipeline.stages.pending_row import PendingRow
from pipeline.stages.row_result import RowResult

if typing.TYPE_CHECKING:
    import numpy as np

    from blip2_actor import MatchingEngine


class EmbeddingsAndScores:
    """Makes the vectors and scores that a run asks for."""

    def __init__(
        self, outputs: Outputs, engine: EngineLike, score_engine: MatchingEngine | None, text_prefix: str
    ) -> None:
        """Prepare the outputs; both engines are already running.

        Args:
            engine: the engine of the stage; a `MatchingEngine` if the run makes only its scores.
            score_engine: a second engine for the scores, if a retrieval checkpoint computes them next to
                `engine`; it is closed by `close`.
            text_prefix: prefix of the columns whose texts are scored.
        """
        self._outputs = outputs
        self._asks, self._embeds, self._scores = outputs.asks, outputs.embeds, outputs.scores
        self._engine = engine
        self._score_engine = score_engine
        self._matcher = typing.cast("MatchingEngine", engine) if outputs.only_matches else score_engine
        self._text_prefix = text_prefix
        self.are_wanted = bool(self._embeds or self._scores)
        self.share_the_encoder = bool(self._embeds or (self._scores and self._matcher is None))

    def stats(self) -> list[EngineStats]:
        """Return the counters of the second engine, if there is one."""
        return [] if self._score_engine is None else [self._score_engine.stats()]

    def close(self) -> None:
        """Close the second engine."""
        if self._score_engine is not None:
            self._score_engine.close()

    def add(self, table: pa.Table, rows: Sequence[tuple[PendingRow, RowResult]]) -> None:
        """Add the vectors and scores to rows whose status is ok.

        A row without a text gets no score. A text that cannot be scored decides the status of its row.
        """
        if rows and self._embeds:
            self._embed(rows)
        if rows and self._scores:
            self._score(table, rows)

    def _embed(self, rows: Sequence[tuple[PendingRow, RowResult]]) -> None:
        found = self._engine.features([row.image for row, _ in rows if row.image is not None])
        for (_, result), features in zip(rows, found, strict=True):
            if features.status is not Status.OK:
                result.result = Result(status=features.status, error=features.error)
                continue
            for name, kind in self._embeds.items():
                vector = _vector(features, kind)
                if vector is not None:
                    result.named[name] = vector

    def _score(self, table: pa.Table, rows: Sequence[tuple[PendingRow, RowResult]]) -> None:
        images, texts, prompts, targets = [], [], [], []
        for row, result in rows:
            for name, source in self._scores.items():
                text = self._text(table, row, result, source)
                if text and text.strip() and row.image is not None:
                    images.append(row.image)
                    texts.append(text)
                    prompts.append(self._asks.get(source, row.prompt))
                    targets.append((result, name))
        found = self._compute_scores(images, texts, prompts)
        for (result, name), (score, status, error) in zip(targets, found, strict=True):
            if score is not None:
                result.named[name] = score
            else:
                result.result = Result(status=status, error=f"{name}: {error}")

    def _compute_scores(
        self, images: Sequence[ImageLike], texts: Sequence[str], prompts: Sequence[str | None]
    ) -> list[tuple[float | None, Status, str | None]]:
        """Return score, status and error of each text."""
        if self._matcher is None:
            scores = self._engine.score(images, texts, prompts)
            return [(score.logprob, score.status, score.error) for score in scores]
        matches = self._matcher.score(images, texts)
        if self._outputs.score_kind == "itc":
            return [(match.itc, match.status, match.error) for match in matches]
        return [(match.itm, match.status, match.error) for match in matches]

    def _text(self, table: pa.Table, row: PendingRow, result: RowResult, source: str) -> str | None:
        """Return the text to score: an answer, the caption, or the text of a column."""
        if source in self._asks:
            return str(result.named[source])
        if source == CAPTION and self._outputs.caption:
            return result.result.text
        text: str | None = table[self._text_prefix + source][row.position].as_py()
        return text


def _vector(features: Features, kind: str) -> np.ndarray | None:
    """Return float32[Dv], float32[Dq] or float32[Q, Dq], depending on the kind that `Outputs.embed` names."""
    if kind == "vision":
        return features.pooler_output
    queries = features.qformer_features
    return queries if queries is None or kind == "queries" else queries.mean(axis=0)
