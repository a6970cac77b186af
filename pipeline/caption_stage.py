"""The caption stage: pixels become captions, through the same actor class that Serve runs.

Several calls run at once inside one actor; each submits its rows and waits for their futures, so that
the engine's slots refill across calls.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait

import numpy as np
import pyarrow as pa

from blip2_actor import Blip2Actor, GenerationOptions, Request, Result, Status
from blip2_actor.request import EngineBuilder
from pipeline.decode_stage import PIXELS
from pipeline.schema import result_fields
from pipeline.worker_exit import end_without_ceremony


class EngineFault(RuntimeError):
    """The engine or its device has failed, and every request with it: the process should end."""


Settled = list[tuple[int, Result]]
"""Rows of a table and what became of them."""


class CaptionStage:
    """Captions tables of the decode stage; held by an actor of a Ray Data pool, thread-safe."""

    def __init__(
        self,
        engine: EngineBuilder,
        options: GenerationOptions,
        prompt: str | None = None,
        prompt_column: str | None = None,
    ) -> None:
        end_without_ceremony()
        self.actor = Blip2Actor(engine, options)
        self.fields = result_fields(options.num_return_sequences)
        self._prompt = prompt
        self._prompt_column = prompt_column

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
        waiting = self._submit(table, rows)
        piece: Settled = []
        due = _due(piece_s)
        try:
            for row, future in waiting:
                while len(piece) == piece_rows or not _is_done(future, due):
                    yield piece
                    piece, due = [], _due(piece_s)
                piece.append((row, _result(future)))
            if piece:
                yield piece
        finally:
            for _, future in waiting:
                if isinstance(future, Future):
                    future.cancel()

    def with_results(self, table: pa.Table, settled: Settled) -> pa.Table:
        """The settled rows of a table, with the result columns in place of the pixels."""
        rest = table.drop_columns([PIXELS])
        taken = rest.take(pa.array([row for row, _ in settled], pa.int64()))
        results = [result for _, result in settled]
        columns = _result_columns(results)
        columns |= {name: taken[name] for name in ("width", "height", "sha256")}
        kept = taken.drop_columns([name for name in taken.column_names if name in columns])
        for field in self.fields:
            kept = kept.append_column(field, columns[field.name])
        return kept

    def _submit(self, table: pa.Table, rows: Sequence[int]) -> list[tuple[int, Future[Result] | Result]]:
        statuses, errors, pixels = table["status"], table["error"], table[PIXELS]
        prompts = table[self._prompt_column] if self._prompt_column else None
        size_px = self.actor.info.image_size_px
        submitted: list[tuple[int, Future[Result] | Result]] = []
        for row in rows:
            status = Status(statuses[row].as_py())
            if status is not Status.OK:
                submitted.append((row, Result(status=status, error=errors[row].as_py())))
                continue
            image = np.frombuffer(pixels[row].as_buffer(), np.uint8).reshape(size_px, size_px, 3)
            prompt = self._prompt if prompts is None else prompts[row].as_py()
            try:
                submitted.append((row, self.actor.submit(Request(image=image, prompt=prompt))))
            except RuntimeError as error:
                raise EngineFault(str(error)) from error
        return submitted


def _due(piece_s: float | None) -> float:
    return float("inf") if piece_s is None else time.monotonic() + piece_s


def _is_done(future: Future[Result] | Result, due: float) -> bool:
    """Wait for a result until it is due; False once it is due, so that steady work is handed on too."""
    left_s = due - time.monotonic()
    if isinstance(future, Result) or left_s <= 0:
        return left_s > 0
    return bool(wait([future], None if left_s == float("inf") else left_s).done)


def _result(future: Future[Result] | Result) -> Result:
    if isinstance(future, Result):
        return future
    error = future.exception()
    if error is not None:
        raise EngineFault(f"{type(error).__name__}: {error}") from error
    return future.result()


def _result_columns(results: Sequence[Result]) -> dict[str, pa.Array]:
    best = [result.completions[0] if result.ok and result.completions else None for result in results]
    several = [
        result.completions if result.ok and len(result.completions) > 1 else None for result in results
    ]
    return {
        "caption": pa.array([one and one.text for one in best], pa.string()),
        "captions": pa.array([many and [c.text for c in many] for many in several], pa.list_(pa.string())),
        "logprobs": pa.array(
            [many and [c.logprob for c in many] for many in several], pa.list_(pa.float32())
        ),
        "logprob": pa.array([one and one.logprob for one in best], pa.float32()),
        "num_tokens": pa.array([one and len(one.token_ids) for one in best], pa.int32()),
        "finish_reason": pa.array([one and one.finish_reason for one in best], pa.string()),
        "flags": pa.array([[] for _ in results], pa.list_(pa.string())),
        "status": pa.array([result.status.value for result in results], pa.string()),
        "error": pa.array([result.error for result in results], pa.string()),
    }
