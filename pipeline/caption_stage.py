"""The caption stage: pixels become captions, through the same actor class that Serve runs.

Several calls run at once inside one actor; each submits its rows and waits for their futures, so that
the engine's slots refill across calls. Whatever is asked of an image shares its pass through the vision
encoder: the requests at once, vectors and scores for a piece of finished rows together.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from blip2_actor import Blip2Actor, GenerationOptions, Request, Result, Status
from blip2_actor.request import EngineBuilder, ImageLike
from pipeline.decode_stage import PIXELS
from pipeline.guard import REGENERATED, marks, sterner
from pipeline.made import Made, columns_of, vector_of
from pipeline.outputs import CAPTION, Outputs
from pipeline.schema import result_fields
from pipeline.shared_results import SharedResults
from pipeline.worker_exit import end_without_ceremony


class EngineFault(RuntimeError):
    """The engine or its device has failed, and every request with it: the process should end."""


Settled = list[tuple[int, Made]]
"""Rows of a table and what became of them."""
Pending = Future[Result] | Result


@dataclass(slots=True)
class _Row:
    """A row under way."""

    position: int
    pending: list[Pending]
    """The caption, where one is made, and the answers in the order of the asks."""
    prompt: str | None = None
    image: ImageLike | None = None
    """Where more is to be made of it when the texts are there."""
    identity: tuple[object, ...] = ()
    """The same for identical images."""
    results: list[Result] = field(default_factory=list)


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
        self.actor = Blip2Actor(engine, options)
        self.named = outputs.fields(self.actor.info)
        self.captioned = outputs.caption
        self.fields = (*result_fields(outputs.caption, options.num_return_sequences), *self.named)
        self._prompt = prompt
        self._prompt_column = prompt_column
        self._text_prefix = text_prefix
        self._shared = SharedResults() if reuse_identical else None
        self._asks, self._embeds, self._scores = outputs.asks, outputs.embeds, outputs.scores
        self._again = sterner(options) if outputs.regenerate else None

    def __call__(self, table: pa.Table) -> pa.Table:
        """Caption a whole table and give it back with the result columns."""
        settled = [pair for piece in self.settle(table, range(len(table))) for pair in piece]
        return self.with_results(table, settled)

    def settle(
        self,
        table: pa.Table,
        rows: Sequence[int],
        piece_rows: int | None = None,
        piece_s: float | None = None,
    ) -> Iterator[Settled]:
        """Submit rows at once and yield them in order, in pieces, as they finish.

        Args:
            rows: positions in the table.
            piece_rows: a piece is yielded when it holds so many rows,
            piece_s: or, possibly empty, when so many seconds have passed.

        Raises:
            EngineFault: the engine itself has failed; a bad row is a result, never an exception.
        """
        waiting = deque(self._submit(table, rows))
        piece: list[_Row] = []
        due = _due(piece_s)
        try:
            while waiting:
                while len(piece) == piece_rows or not _is_done(waiting[0].pending, due):
                    yield self._finish(table, piece)
                    piece, due = [], _due(piece_s)
                row = waiting.popleft()
                row.results = [_result(future) for future in row.pending]
                row.pending.clear()  # futures hold on to the image
                piece.append(row)
            if piece:
                yield self._finish(table, piece)
        finally:
            if self._shared is None:
                for row in waiting:
                    for future in row.pending:
                        if isinstance(future, Future):
                            future.cancel()

    def with_results(self, table: pa.Table, settled: Settled) -> pa.Table:
        """The settled rows of a table, with the result columns in place of the pixels."""
        rest = table.drop_columns([PIXELS])
        taken = rest.take(pa.array([row for row, _ in settled], pa.int64()))
        columns = columns_of([made for _, made in settled], self.named)
        columns |= {name: taken[name] for name in ("width", "height", "sha256")}
        kept = taken.drop_columns([name for name in taken.column_names if name in columns])
        for column in self.fields:
            kept = kept.append_column(column, columns[column.name])
        return kept

    # Texts ----------------------------------------------------------------------------------------------

    def _submit(self, table: pa.Table, rows: Sequence[int]) -> list[_Row]:
        statuses, errors, pixels = table["status"], table["error"], table[PIXELS]
        prompts = table[self._prompt_column] if self._prompt_column else None
        size_px = self.actor.info.image_size_px
        num_texts = len(self._asks) + self.captioned
        is_shared = bool(num_texts > 1 or self._embeds or self._scores)
        is_held = bool(self._embeds or self._scores or self._again)
        submitted: list[_Row] = []
        for position in rows:
            status = Status(statuses[position].as_py())
            if status is not Status.OK:
                submitted.append(_Row(position, [Result(status=status, error=errors[position].as_py())]))
                continue
            image: ImageLike = np.frombuffer(pixels[position].as_buffer(), np.uint8).reshape(
                size_px, size_px, 3
            )
            if is_shared:
                image = self.actor.engine.image(image)
            prompt = self._prompt if prompts is None else prompts[position].as_py()
            row = _Row(position, [], prompt, image if is_held else None)
            if self._shared is not None:
                # Arrays of two shapes may have the same bytes.
                row.identity = tuple(table[name][position].as_py() for name in ("sha256", "width", "height"))
            asked = [prompt, *self._asks.values()] if self.captioned else self._asks.values()
            row.pending = [self._request(row, Request(image=image, prompt=text)) for text in asked]
            submitted.append(row)
        return submitted

    def _request(self, row: _Row, request: Request) -> Pending:
        with _faults():
            if self._shared is None:
                return self.actor.submit(request)
            key = (*row.identity, request.prompt, request.options)
            return self._shared.get(key, lambda: self.actor.submit(request))

    # Everything else --------------------------------------------------------------------------------------

    def _finish(self, table: pa.Table, rows: Sequence[_Row]) -> Settled:
        """Make of rows with texts what is made of several at once."""
        made = [self._guarded(row) for row in rows]
        if self._again is not None:
            self._regenerate(rows, made)
        good = [(row, one) for row, one in zip(rows, made, strict=True) if one.result.ok]
        if good and (self._embeds or self._scores):
            with _faults():
                self._embed(good)
                self._score(table, good)
        return [(row.position, one) for row, one in zip(rows, made, strict=True)]

    def _guarded(self, row: _Row) -> Made:
        """The texts of a row, and what the guard says of its caption."""
        for result in row.results:
            if not result.ok:
                return Made(result)
        answers = row.results[1:] if self.captioned else row.results
        made = Made(row.results[0] if self.captioned else Result())
        made.named.update(zip(self._asks, (answer.text or "" for answer in answers), strict=True))
        if self.captioned:
            made.flags = marks(made.result.text or "", row.prompt)
        return made

    def _regenerate(self, rows: Sequence[_Row], made: Sequence[Made]) -> None:
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
                one.flags = [*marks(result.text or "", row.prompt), REGENERATED]

    def _embed(self, rows: Sequence[tuple[_Row, Made]]) -> None:
        if not self._embeds:
            return
        found = self.actor.engine.features([row.image for row, _ in rows if row.image is not None])
        for (_, made), features in zip(rows, found, strict=True):
            for name, kind in self._embeds.items():
                vector = vector_of(features, kind)
                if vector is not None:
                    made.named[name] = vector

    def _score(self, table: pa.Table, rows: Sequence[tuple[_Row, Made]]) -> None:
        """A row without a text has no score; a text that cannot be scored decides the row's status."""
        for name, source in self._scores.items():
            images, texts, prompts, scored = [], [], [], []
            for row, made in rows:
                text = self._text(table, row, made, source)
                if text and text.strip() and row.image is not None:
                    images.append(row.image)
                    texts.append(text)
                    prompts.append(self._asks.get(source, row.prompt))
                    scored.append(made)
            found = self.actor.engine.score(images, texts, prompts)
            for made, score in zip(scored, found, strict=True):
                if score.logprob is not None:
                    made.named[name] = score.logprob
                else:
                    made.result = Result(status=score.status, error=f"{name}: {score.error}")

    def _text(self, table: pa.Table, row: _Row, made: Made, source: str) -> str | None:
        if source in self._asks:
            return str(made.named[source])
        if source == CAPTION and self.captioned:
            return made.result.text
        text: str | None = table[self._text_prefix + source][row.position].as_py()
        return text


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
