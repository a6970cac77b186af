"""The caption stage: pixels become captions, through the same actor class that Serve runs.

Several calls run at once inside one actor; each submits its rows and waits for their futures, so that
the engine's slots refill across calls. Whatever is asked of an image shares its pass through the vision
encoder: the requests at once, vectors and scores for a piece of finished rows together.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager

import numpy as np
import pyarrow as pa

from blip2_actor import Blip2Actor, EngineBuilder, GenerationOptions, ImageLike, Request, Result, Status
from pipeline.schema import result_fields
from pipeline.settings.outputs import Outputs
from pipeline.stages.decode import PIXELS
from pipeline.stages.embeddings_and_scores import EmbeddingsAndScores
from pipeline.stages.engine_fault import EngineFault
from pipeline.stages.quality_flags import REGENERATED, find_flags, stricter
from pipeline.stages.result_cache import ResultCache
from pipeline.stages.row_result import Pending, PendingRow, RowResult, columns_of
from pipeline.stages.worker_exit import end_without_ceremony

FinishedRows = list[tuple[int, RowResult]]
"""Rows of a table and what became of them."""


class CaptionStage:
    """Captions tables of the decode stage; held by an actor of a Ray Data pool, thread-safe."""

    def __init__(
        self,
        engine: EngineBuilder,
        options: GenerationOptions,
        prompt: str | None = None,
        prompt_column: str | None = None,
        outputs: Outputs = Outputs(),
        reuse_identical: bool = False,
        text_prefix: str = "",
    ) -> None:
        """Start an engine.

        Args:
            outputs: what is made of each image.
            reuse_identical: make the texts of identical images once.
            text_prefix: stands before the names of the columns whose texts are scored.
        """
        end_without_ceremony()
        matching = outputs.matching(engine)
        # First, because the engine makes itself as large as free memory allows.
        beside = None if matching is None or outputs.only_matches else matching.build()
        self.actor = Blip2Actor(engine, options)
        self.named = outputs.fields(self.actor.info)
        self.captioned = outputs.caption
        self.fields = (*result_fields(outputs.caption, options.num_return_sequences), *self.named)
        self._prompt = prompt
        self._prompt_column = prompt_column
        self._embeddings_and_scores = EmbeddingsAndScores(outputs, self.actor.engine, beside, text_prefix)
        self._shared = ResultCache() if reuse_identical else None
        self._asks = outputs.asks
        # Of an answer only the best text is kept.
        several = options.num_return_sequences > 1
        self._answer = dataclasses.replace(options, num_return_sequences=1) if several else None
        self._again = stricter(options) if outputs.regenerate else None

    @property
    def busy_s(self) -> float:
        """Seconds that the engines have worked."""
        return self.actor.stats().busy_s + self._embeddings_and_scores.busy_s

    def close(self) -> None:
        """Finish what runs, refuse what comes, free the device."""
        self.actor.close()
        self._embeddings_and_scores.close()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Caption a whole table and give it back with the result columns."""
        settled = [pair for piece in self.finish_rows(table, range(len(table))) for pair in piece]
        return self.with_results(table, settled)

    def finish_rows(
        self,
        table: pa.Table,
        rows: Sequence[int],
        piece_rows: int | None = None,
        piece_s: float | None = None,
    ) -> Iterator[FinishedRows]:
        """Submit rows at once and yield them in order, in pieces, as they finish.

        Args:
            rows: positions in the table.
            piece_rows: a piece is yielded when it holds so many rows,
            piece_s: or, possibly empty, when so many seconds have passed.

        Raises:
            EngineFault: the engine itself has failed; a bad row is a result, never an exception.
        """
        waiting = deque(self._submit(table, rows))
        piece: list[PendingRow] = []
        due = _due(piece_s)
        try:
            while waiting:
                while len(piece) == piece_rows or not _is_done(waiting[0].pending, due):
                    yield self._finish(table, piece)
                    piece, due = [], _due(piece_s)
                row = waiting.popleft()
                row.results = [_result(future) for future in row.pending]
                piece.append(row)
            if piece:
                yield self._finish(table, piece)
        finally:
            if self._shared is None:
                for row in waiting:
                    for future in row.pending:
                        if isinstance(future, Future):
                            future.cancel()

    def with_results(self, table: pa.Table, settled: FinishedRows) -> pa.Table:
        """The settled rows of a table, with the result columns in place of the pixels."""
        rest = table.drop_columns([PIXELS])
        taken = rest.take(pa.array([row for row, _ in settled], pa.int64()))
        columns = columns_of([made for _, made in settled], self.named)
        columns |= {name: taken[name] for name in ("width", "height", "sha256")}
        ours = {column.name for column in self.fields}
        kept = taken.drop_columns([name for name in taken.column_names if name in ours])
        for column in self.fields:
            kept = kept.append_column(column, columns[column.name])
        return kept

    # Texts ----------------------------------------------------------------------------------------------

    def _submit(self, table: pa.Table, rows: Sequence[int]) -> list[PendingRow]:
        statuses, errors, pixels = table["status"], table["error"], table[PIXELS]
        prompts = table[self._prompt_column] if self._prompt_column else None
        size_px = self.actor.info.image_size_px
        num_texts = len(self._asks) + self.captioned
        is_shared = num_texts > 1 or self._embeddings_and_scores.share_the_encoder
        is_held = self._embeddings_and_scores.are_wanted or self._again is not None
        submitted: list[PendingRow] = []
        for position in rows:
            status = Status(statuses[position].as_py())
            if status is not Status.OK:
                submitted.append(
                    PendingRow(position, [Result(status=status, error=errors[position].as_py())])
                )
                continue
            image: ImageLike = np.frombuffer(pixels[position].as_buffer(), np.uint8).reshape(
                size_px, size_px, 3
            )
            if is_shared:
                image = self.actor.engine.image(image)
            prompt = self._prompt if prompts is None else prompts[position].as_py()
            row = PendingRow(position, [], prompt, image if is_held else None)
            if self._shared is not None:
                # Arrays of two shapes may have the same bytes.
                row.identity = tuple(table[name][position].as_py() for name in ("sha256", "width", "height"))
            asked = [Request(image=image, prompt=prompt)] if self.captioned else []
            asked += [Request(image=image, prompt=ask, options=self._answer) for ask in self._asks.values()]
            row.pending = [self._request(row, request) for request in asked]
            submitted.append(row)
        return submitted

    def _request(self, row: PendingRow, request: Request) -> Pending:
        with _faults():
            if self._shared is None:
                return self.actor.submit(request)
            key = (*row.identity, request.prompt, request.options)
            return self._shared.get(key, lambda: self.actor.submit(request))

    # Everything else --------------------------------------------------------------------------------------

    def _finish(self, table: pa.Table, rows: Sequence[PendingRow]) -> FinishedRows:
        """Make of rows with texts what is made of several at once."""
        made = [self._guarded(row) for row in rows]
        if self._again is not None:
            self._regenerate(rows, made)
        good = [(row, one) for row, one in zip(rows, made, strict=True) if one.result.ok]
        with _faults():
            self._embeddings_and_scores.add(table, good)
        for row in rows:
            row.image = None  # encoded, it holds memory of the device
        return [(row.position, one) for row, one in zip(rows, made, strict=True)]

    def _guarded(self, row: PendingRow) -> RowResult:
        """The texts of a row, and what the guard says of its caption."""
        for result in row.results:
            if not result.ok:
                return RowResult(result)
        answers = row.results[1:] if self.captioned else row.results
        made = RowResult(row.results[0] if self.captioned else Result())
        made.named.update(zip(self._asks, (answer.text or "" for answer in answers), strict=True))
        if self.captioned:
            made.flags = find_flags(made.result.text or "", row.prompt)
        return made

    def _regenerate(self, rows: Sequence[PendingRow], made: Sequence[RowResult]) -> None:
        """A second try, with its own marks, for the captions that are marked."""
        tried = []
        for row, one in zip(rows, made, strict=True):
            if one.flags and row.image is not None:
                request = Request(image=row.image, prompt=row.prompt, options=self._again)
                tried.append((row, one, self._request(row, request)))
        for row, one, future in tried:
            result = _result(future)
            if result.ok:
                one.result = result
                one.flags = [*find_flags(result.text or "", row.prompt), REGENERATED]


@contextmanager
def _faults() -> Iterator[None]:
    """What the engine raises is no row's fault."""
    try:
        yield
    except Exception as error:
        raise EngineFault(f"{type(error).__name__}: {error}") from error


def _due(piece_s: float | None) -> float:
    return float("inf") if piece_s is None else time.monotonic() + piece_s


def _is_done(pending: Sequence[Pending], due: float) -> bool:
    """Wait for results until they are due; False once they are, so that steady work is handed on too."""
    for future in pending:
        left_s = due - time.monotonic()
        if left_s <= 0:
            return False
        timeout_s = None if left_s == float("inf") else left_s
        if isinstance(future, Future) and not wait([future], timeout_s).done:
            return False
    return True


def _result(future: Pending) -> Result:
    if isinstance(future, Result):
        return future
    error = future.exception()
    if error is not None:
        raise EngineFault(f"{type(error).__name__}: {error}") from error
    return future.result()
