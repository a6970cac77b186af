"""Record the captions of two models as Parquet files with the columns of a run, for `blip2 compare A B`.

Nothing waits for the files. What cannot be written in time, or is more than a limit, is left out and counted.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from blip2_actor import Result, find_quality_flags
from deploy.observe.metrics import TRIAL_ROWS
from deploy.reuse.made import Made
from deploy.trials.share import Kind

Side = Literal["A", "B"]
"""A is the first model of the service, B the one on trial."""

ROWS_PER_FILE = 1_000
MAX_AGE_S = 60.0
"""Rows are written after this time if there are fewer."""
MAX_ROWS = 1_000_000
"""Rows that one gateway writes from its start to its end: some hundred MB."""
MAX_PENDING_FILES = 16
"""Maximum number of files that wait for a slow disk."""

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("logprob", pa.float32()),
        pa.field("num_tokens", pa.int32()),
        pa.field("finish_reason", pa.string()),
        pa.field("flags", pa.list_(pa.string()), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("sha256", pa.binary()),
        pa.field("model", pa.string(), nullable=False),
        pa.field("prompt", pa.string()),
    ]
)
"""The key is the image's SHA-256, and the shard the request's id: so the two rows of one request are a pair,
and else those of one image."""

logger = logging.getLogger("ray.serve")


class Recorder:
    """Writes rows in a thread of its own, each file whole or not at all. `add` is for one thread."""

    def __init__(self, folder: str, with_prompts: bool) -> None:
        """
        Args:
            folder: of this machine; it gets FOLDER/KIND/A and FOLDER/KIND/B.
            with_prompts: prompts may be private, and are left out by default.
        """
        self._folder = Path(folder)
        self._with_prompts = with_prompts
        self._rows: dict[tuple[Kind, Side], list[dict[str, Any]]] = {}
        self._since_s = time.monotonic()
        self._name = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        self._num_rows = 0
        self._num_written = 0
        self._writer = ThreadPoolExecutor(1, "trial-recorder")
        self._writing: list[Future[None]] = []

    def add(
        self, kind: Kind, side: Side, request: str, model: str, prompt: str | None, result: Result, made: Made
    ) -> None:
        """Record what a model has said of an image.

        Args:
            request: id of the request.
            made: of the image, by whichever model.
        """
        if self._num_rows >= MAX_ROWS:
            TRIAL_ROWS.inc(1, {"result": "dropped"})
            return
        self._num_rows += 1
        text = result.text
        row = {
            "key": made.sha256,
            "shard": request,
            "row": 0,
            "caption": text,
            "logprob": result.logprob,
            "num_tokens": made.num_tokens if made.num_tokens is not None else len(result.token_ids),
            "finish_reason": result.finish_reason,
            "flags": [] if text is None else list(find_quality_flags(text, prompt)),
            "status": result.status.value,
            "error": result.error,
            "width": made.image.width,
            "height": made.image.height,
            "sha256": bytes.fromhex(made.sha256),
            "model": model,
            "prompt": prompt if self._with_prompts else None,
        }
        self._rows.setdefault((kind, side), []).append(row)
        self.write_if_due()

    def write_if_due(self) -> None:
        """Begin to write what is there if it is enough for a file, or has waited long enough."""
        is_old = time.monotonic() - self._since_s > MAX_AGE_S
        if is_old or any(len(rows) >= ROWS_PER_FILE for rows in self._rows.values()):
            self._begin_to_write()

    def close(self) -> None:
        """Write what is left."""
        self._begin_to_write()
        self._writer.shutdown()

    def _begin_to_write(self) -> None:
        """Hand all rows over together, so that both rows of a pair are in files of the same number."""
        self._since_s = time.monotonic()
        if not self._rows:
            return
        rows, self._rows = self._rows, {}
        self._writing = [writing for writing in self._writing if not writing.done()]
        if len(self._writing) >= MAX_PENDING_FILES:
            TRIAL_ROWS.inc(sum(map(len, rows.values())), {"result": "dropped"})
            return
        name = f"{self._name}-{self._num_written:06}.parquet"
        self._num_written += 1
        for (kind, side), of_side in rows.items():
            path = self._folder / kind / side / name
            self._writing.append(self._writer.submit(self._write, path, of_side))

    def _write(self, path: Path, rows: list[dict[str, Any]]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".tmp")
            pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), unfinished)
            unfinished.replace(path)
            TRIAL_ROWS.inc(len(rows), {"result": "written"})
        except OSError:
            logger.exception("the rows of a trial could not be written")
            TRIAL_ROWS.inc(len(rows), {"result": "dropped"})
