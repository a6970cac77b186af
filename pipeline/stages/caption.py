"""The caption stage: pixels become captions, through the same actor class that Serve runs.

Several calls run at the same time inside one actor. Each submits its rows and waits for their futures, so
that the slots of the engine are refilled across calls. All outputs of an image share one pass of the vision
encoder: the texts of a row are requested together; vectors and scores are computed for a piece of finished
rows at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from blip2_actor import (
    Blip2Actor,
    EngineStats,
    GenerationOptions,
    ImageLike,
    Request,
    Result,
    Status,
    abstention_flags,
    find_quality_flags,
    stricter_options,
)
from pipeline.caption_counts import REGENERATED
from pipeline.endpoint.waiting import GivenUp
from pipeline.schema import to_plain
from pipeline.settings.caption_spec import CaptionSpec
from pipeline.settings.outputs import CONFIDENCE
from pipeline.stages.decode import PIXELS, TRUNCATED, TRUNCATED_FLAG
from pipeline.stages.embeddings_and_scores import EmbeddingsAndScores
from pipeline.stages.engine_fault import engine_faults
from pipeline.stages.pending_row import Pending, PendingRow
from pipeline.stages.result_cache import ResultCache
from pipeline.stages.row_result import RowResult, columns_of
from pipeline.stages.worker_exit import exit_without_destructors

FinishedRows = list[tuple[int, RowResult]]
"""Positions in a table, and the results of these rows."""


class CaptionStage:
    """Captions tables of the decode stage. An actor of a Ray Data pool holds it; thread-safe."""

    def __init__(self, spec: CaptionSpec) -> None:
        """Start the engine that a spec names."""
        exit_without_destructors()
        outputs = spec.outputs
        matching = outputs.matching(spec.engine)
        # The second engine comes first, because the captioning engine takes the memory that is still free.
        score_engine = None if matching is None or outputs.only_matches else matching.build()
        self.actor = Blip2Actor(spec.engine, spec.options)
        self._spec = spec = spec.resolved(self.actor.info)
        options = spec.options
        self.named = outputs.fields
        self.captioned = outputs.caption
        self.fields = spec.fields
        self._embeddings_and_scores = EmbeddingsAndScores(
            outputs, self.actor.engine, score_engine, spec.text_prefix
        )
        self._asks = outputs.asks
        num_texts = len(self._asks) + (1 if outputs.caption else 0)
        self._image_is_shared = num_texts > 1 or self._embeddings_and_scores.share_the_encoder
        self._cache = ResultCache() if spec.reuse_identical else None
        self._answer_options: GenerationOptions | None = None
        if options.num_return_sequences > 1:  # only the best text of an answer is kept
            self._answer_options = dataclasses.replace(options, num_return_sequences=1)
        self._regenerate_options = stricter_options(options) if outputs.regenerate else None

    @property
    def busy_s(self) -> float:
        """Seconds for which the engines have worked."""
        return sum(stats.busy_s for stats in self.stats())

    def stats(self) -> list[EngineStats]:
        """Return the counters of every engine of this stage."""
        return [self.actor.stats(), *self._embeddings_and_scores.stats()]

    def close(self) -> None:
        """Finish running requests, refuse new ones, and free the device."""
        self.actor.close()
        self._embeddings_and_scores.close()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Caption a whole table and return it with the result columns."""
        rows = [row for piece in self.finish_rows(table, range(len(table))) for row in piece]
        return self.with_results(table, rows)

    def finish_rows(
        self,
        table: pa.Table,
        positions: Sequence[int],
        piece_rows: int | None = None,
        piece_s: float = threading.TIMEOUT_MAX,
    ) -> Iterator[FinishedRows]:
        """Submit rows at once and yield them in order, in pieces, as they finish.

        With an endpoint, rows are left out if the job stops before they are made.

        Args:
            positions: the rows of the table to caption.
            piece_rows: yield a piece when it has this many rows; default: never.
            piece_s: yield a piece, possibly an empty one, after this many seconds; default: never.

        Raises:
            EngineFault: the engine itself has failed. A bad row is a result, never an exception.
        """
        waiting: deque[PendingRow] = deque()
        piece: list[PendingRow] = []
        due = time.monotonic() + piece_s
        try:
            waiting.extend(self._submit(table, positions))
            while waiting:
                while len(piece) == piece_rows or not waiting[0].is_done_by(due):
                    yield self._finish(table, piece)
                    piece, due = [], time.monotonic() + piece_s
                row = waiting.popleft()
                row.collect()
                piece.append(row)
            if piece:
                yield self._finish(table, piece)
        except GivenUp:
            return  # the job stops; its next start makes these rows
        finally:
            if self._cache is None:
                for row in waiting:
                    row.cancel()

    def with_results(self, table: pa.Table, rows: FinishedRows) -> pa.Table:
        """Return finished rows of a table, with the result columns in place of the pixels.

        Args:
            rows: in ascending order of their positions.
        """
        without_pixels = table.drop_columns([n for n in (PIXELS, TRUNCATED) if n in table.column_names])
        is_finished = np.zeros(len(table), bool)
        is_finished[[position for position, _ in rows]] = True
        kept = [_select(column, pa.array(is_finished)) for column in without_pixels.columns]
        taken = pa.table(kept, without_pixels.column_names)
        columns = columns_of([result for _, result in rows], self.named)
        columns |= {name: taken[name] for name in ("width", "height", "sha256")}
        replaced = {column.name for column in self.fields}
        taken = taken.drop_columns([name for name in taken.column_names if name in replaced])
        for column in self.fields:
            taken = taken.append_column(column, columns[column.name])
        return taken

    # Texts ----------------------------------------------------------------------------------------------

    def _submit(self, table: pa.Table, positions: Sequence[int]) -> list[PendingRow]:
        """Request the texts of rows; a row that failed in an earlier stage already has its result."""
        statuses, errors = table["status"], table["error"]
        submitted = []
        for position in positions:
            status = Status(statuses[position].as_py())
            if status is Status.OK:
                submitted.append(self._submit_row(table, position))
            else:
                result = Result(status=status, error=errors[position].as_py())
                submitted.append(PendingRow(position, [result]))
        return submitted

    def _submit_row(self, table: pa.Table, position: int) -> PendingRow:
        spec = self._spec
        prompt = spec.prompt if spec.prompt_column is None else table[spec.prompt_column][position].as_py()
        image = self._image(table, position)
        is_used_later = self._embeddings_and_scores.are_wanted or self._regenerate_options is not None
        row = PendingRow(position, [], prompt, image if is_used_later else None)
        if self._cache is not None:
            # A digest of what the engine sees: arrays of different layouts may have the same bytes.
            row.image_key = hashlib.sha256(table[PIXELS][position].as_buffer()).digest()
        requests = [Request(image=image, prompt=prompt)] if self.captioned else []
        for ask in self._asks.values():
            requests.append(Request(image=image, prompt=ask, options=self._answer_options))
        row.pending = [self._request(row, request) for request in requests]
        return row

    def _image(self, table: pa.Table, position: int) -> ImageLike:
        """Return uint8[S, S, 3], or a handle of the engine if several outputs share the encoded image."""
        size_px = self.actor.info.image_size_px
        pixels = np.frombuffer(table[PIXELS][position].as_buffer(), np.uint8).reshape(size_px, size_px, 3)
        return self.actor.engine.image(pixels) if self._image_is_shared else pixels

    def _request(self, row: PendingRow, request: Request) -> Pending:
        with engine_faults():
            if self._cache is None:
                return self.actor.submit(request)
            key = (row.image_key, request.prompt, request.options)
            return self._cache.get(key, lambda: self.actor.submit(request))

    # Results --------------------------------------------------------------------------------------------

    def _finish(self, table: pa.Table, rows: Sequence[PendingRow]) -> FinishedRows:
        """Make the results of rows whose texts are there, including what is made for several rows at once."""
        results = [self._with_texts(row) for row in rows]
        if self._regenerate_options is not None:
            self._regenerate(rows, results)
        good = [(row, result) for row, result in zip(rows, results, strict=True) if result.result.ok]
        self._add_confidence([result for _, result in good])
        with engine_faults():
            self._embeddings_and_scores.add(table, good)
        if TRUNCATED in table.column_names:
            for row, result in good:
                if table[TRUNCATED][row.position].as_py():
                    result.flags.append(TRUNCATED_FLAG)
        for row in rows:
            row.image = None  # an encoded image holds memory of the device
        return [(row.position, result) for row, result in zip(rows, results, strict=True)]

    def _with_texts(self, row: PendingRow) -> RowResult:
        """Return the texts of a row, and the flags of its caption."""
        for result in row.results:
            if not result.ok:
                return RowResult(result)
        answers = row.results[1:] if self.captioned else row.results
        finished = RowResult(row.results[0] if self.captioned else Result())
        texts = (answer.text or "" for answer in answers)
        finished.named.update(zip(self._asks, texts, strict=True))
        if self.captioned:
            finished.flags = find_quality_flags(finished.result.text or "", row.prompt)
        return finished

    def _add_confidence(self, results: Sequence[RowResult]) -> None:
        """Add the probability that each caption is right; regenerated captions have none."""
        if (calibration := self._spec.calibration) is None:
            return
        for row in results:
            if REGENERATED not in row.flags and (sure := calibration.confidence(row.result)) is not None:
                row.named[CONFIDENCE] = sure
                row.flags += abstention_flags(sure, self._spec.outputs.min_confidence)

    def _regenerate(self, rows: Sequence[PendingRow], results: Sequence[RowResult]) -> None:
        """Generate flagged captions again, with stricter options, and find the flags of the new ones."""
        requested = []
        for row, result in zip(rows, results, strict=True):
            if result.flags and row.image is not None:
                request = Request(image=row.image, prompt=row.prompt, options=self._regenerate_options)
                again = PendingRow(row.position, [self._request(row, request)], row.prompt)
                requested.append((again, result))
        for again, result in requested:
            again.collect()
            (regenerated,) = again.results
            if regenerated.ok:
                result.result = regenerated
                result.flags = [*find_quality_flags(regenerated.text or "", again.prompt), REGENERATED]


def _select(column: pa.ChunkedArray, is_finished: pa.Array) -> pa.ChunkedArray:
    # Not `take`: it joins the chunks first, and more than 2 GiB of strings do not fit into one chunk.
    try:
        return column.filter(is_finished)
    except pa.ArrowNotImplementedError:  # of views
        return to_plain(column).filter(is_finished)
