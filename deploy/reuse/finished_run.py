"""The captions of a finished batch run, looked up by the content of the image.

The run's Parquet files are read by the row contract: columns of fixed names, and in each footer the settings
that decide the rows (`blip2.run`). Only the place of each image's row is kept in memory: 16 bytes a row.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from blip2_actor import Completion, DecodedImage, GenerationOptions, ImageLimits, ModelInfo, Result
from blip2_actor.flags import split_uri
from deploy.reuse.made import Made
from deploy.work import ImageOutputs, ImageWork, TextToGenerate

RUN_KEY = b"blip2.run"
"""Key in the footer of each file: the settings that decide the rows, as JSON."""
KEPT_ROW_GROUPS = 32
"""Row groups that stay in memory for the next requests; images of one shard are often asked for together."""
NUM_THREADS = 4
"""Rows that are read at the same time."""
READ_WITHIN_S = 5.0
"""Seconds for reading a row; after this time the engine is asked."""
LOG_EVERY_S = 60.0
"""Seconds between two lines in the log about a store that fails."""
_COLUMNS = [
    "caption",
    "captions",
    "logprobs",
    "logprob",
    "finish_reason",
    "num_tokens",
    "flags",
    "width",
    "height",
    "sha256",
]


logger = logging.getLogger("ray.serve")


class FinishedRun:
    """Answers one request: the caption of an image, with the prompt and options of the run. Thread-safe."""

    def __init__(self, folder: str, model: ModelInfo, limits: ImageLimits) -> None:
        """Look at a run, and read no rows yet.

        Args:
            folder: the output of a run, on disk or in an object store.
            model: the service's; the run must have had the same.
            limits: how the service decodes images.

        Raises:
            ValueError: the folder has no captions, or the run had another model or other settings.
            OSError: it cannot be read.
        """
        if "://" in folder:
            split_uri("cache_from", folder)
        store, path = fs.FileSystem.from_uri(folder) if "://" in folder else (fs.LocalFileSystem(), folder)
        found = store.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True))
        self._store = store
        self._paths = sorted(info.path for info in found if _is_output(info))
        self._digests, self._places = np.zeros(0, np.uint64), np.zeros((0, 2), np.uint32)
        self._groups: list[tuple[str, int]] = []
        """The row groups of all files, each by its file and its number there."""
        self._row_group = lru_cache(KEPT_ROW_GROUPS)(self._read_row_group)
        self._threads = ThreadPoolExecutor(NUM_THREADS, "finished-run")
        self._logged_at_s = -LOG_EVERY_S
        if not self._paths:
            raise ValueError(
                f"cache_from must be the output of blip2 caption, got {folder}, which has no rows"
            )
        self._run = self._run_of(self._paths[0])
        if self._run is None:
            raise ValueError(f"cache_from must be the output of blip2 caption, got {folder}")
        self.work = _work_of(json.loads(self._run), folder, model, limits)

    def read_index(self) -> None:
        """Read where the row of each image is; until then, nothing is found.

        Raises:
            ValueError: a file is of another run.
            OSError: a file cannot be read.
        """
        digests, places = [self._digests], [self._places]
        for path in self._paths:
            if self._run_of(path) != self._run:
                raise ValueError(f"cache_from must hold one run, got another in {path}")
            file = self._open(path)
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, ["sha256", "status"])
                rows = np.flatnonzero([status == "ok" for status in table["status"].to_pylist()])
                starts = b"".join((digest or bytes(8))[:8] for digest in table["sha256"].to_pylist())
                digests.append(np.frombuffer(starts, ">u8")[rows].astype(np.uint64))
                number = np.full(len(rows), len(self._groups))
                places.append(np.stack([number, rows], axis=1).astype(np.uint32))
                self._groups.append((path, group))
        order = np.argsort(np.concatenate(digests), kind="stable")
        self._digests, self._places = np.concatenate(digests)[order], np.concatenate(places)[order]

    async def look_up(self, sha256: str, work: ImageWork) -> Made | None:
        """Return the caption of an image; None if the run has none, or it cannot be read in time.

        Threads read it, but only if the run has the image, so that a hanging store delays nothing else.
        """
        from deploy.observe.metrics import CACHE_REQUESTS  # imports Ray, too early for a command

        places = self._places_of(sha256, work)
        if not len(places):
            return None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(READ_WITHIN_S):
                found = await loop.run_in_executor(self._threads, self._read, sha256, places)
        except (OSError, pa.ArrowException):  # TimeoutError is an OSError
            CACHE_REQUESTS.inc(1, {"result": "run_failed"})
            if time.monotonic() - self._logged_at_s >= LOG_EVERY_S:
                self._logged_at_s = time.monotonic()
                logger.exception("the run of cache_from cannot be read; the engines answer in its place")
            return None
        if found is not None:
            CACHE_REQUESTS.inc(1, {"result": "run"})
        return found

    def _places_of(self, sha256: str, work: ImageWork) -> np.ndarray:
        """Return the row groups and rows that may hold the caption of an image: uint32[N, 2]."""
        if work != self.work:
            return self._places[:0]
        start = np.uint64(int(sha256[:16], 16))
        first, last = (np.searchsorted(self._digests, start, side) for side in ("left", "right"))
        return self._places[first:last]

    def _read(self, sha256: str, places: np.ndarray) -> Made | None:
        digest = bytes.fromhex(sha256)
        for number, row in places.tolist():
            [columns] = self._row_group(number).slice(row, 1).to_pylist()
            if columns["sha256"] == digest:
                return _made_of(sha256, columns)
        return None

    def _run_of(self, path: str) -> bytes | None:
        return (self._open(path).schema_arrow.metadata or {}).get(RUN_KEY)

    def _read_row_group(self, number: int) -> pa.Table:
        path, group = self._groups[number]
        return self._open(path).read_row_group(group, _COLUMNS)

    def _open(self, path: str) -> pq.ParquetFile:
        return pq.ParquetFile(path, filesystem=self._store)


def _is_output(info: fs.FileInfo) -> bool:
    return info.is_file and info.extension == "parquet" and "/_blip2/" not in info.path


def _work_of(run: Mapping[str, Any], folder: str, model: ModelInfo, limits: ImageLimits) -> ImageWork:
    """Return the work whose outputs are the rows of a run; raise ValueError if the service differs."""
    require = partial(_require_same, folder)
    require("model", run["model"], model.digest)
    require("dtype", run["dtype"], model.dtype)
    require("quantize", run.get("quantize"), model.quantize)
    image = run["image"]
    require("image size", image["size_px"], model.image_size_px)
    require("image_jpeg_draft", image["jpeg_draft"], limits.jpeg_draft)
    require("image_accept_truncated", image.get("accept_truncated", False), limits.accept_truncated)
    require("prompt column", run["columns"]["prompt"], None)
    require("regenerate", run["outputs"]["regenerate"], False)
    require("captions", "caption" in run["outputs"]["columns"], True)
    options = GenerationOptions(**run["options"]).resolve()
    text = TextToGenerate(prompt=run["prompt"] or None, options=options)
    return ImageWork(texts=(text,))


def _require_same(folder: str, what: str, of_run: object, of_service: object) -> None:
    if of_run != of_service:
        raise ValueError(
            f"cache_from must be a run with the {what} of the service ({of_service}), got {of_run} in "
            f"{folder}"
        )


def _made_of(sha256: str, row: Mapping[str, Any]) -> Made:
    texts = row["captions"] or [row["caption"]]
    logprobs = row["logprobs"] or [row["logprob"]]
    completions = tuple(
        Completion(text=text, token_ids=(), logprob=logprob, finish_reason=row["finish_reason"])
        for text, logprob in zip(texts, logprobs, strict=True)
    )
    return Made(
        sha256=sha256,
        image=DecodedImage(
            width=row["width"], height=row["height"], is_truncated="truncated" in row["flags"]
        ),
        outputs=ImageOutputs(texts=(Result(completions=completions),)),
        num_tokens=row["num_tokens"],
    )
