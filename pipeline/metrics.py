"""The metrics of a job: Ray's agent on each node exports them for Prometheus, with the prefix `ray_`.

`docs/monitoring.md` lists them, and a test holds both together. Names end in their unit; Ray adds `_total` to
those of counters.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private import worker
from ray.util.metrics import Counter, Gauge, Histogram, Metric

RUN_ID = "blip2_run"
"""Key of the run's id in the metadata of the job in Ray."""
RUN = "run"
"""Label of every metric: the id of the run."""

ROWS = Counter("blip2_rows", "Rows that have reached a fragment.", tag_keys=("status", RUN))
FRAGMENTS = Counter("blip2_fragments", "Fragments written to the output.", (RUN,))
SHARDS = Gauge("blip2_shards", "Shards of the run: open, committing or done.", tag_keys=("state", RUN))
STAGE_BUSY_S = Counter(
    "blip2_stage_busy_seconds",
    "Seconds for which the workers of a stage have worked.",
    tag_keys=("stage", RUN),
)
STAGE_WORKERS = Gauge(
    "blip2_stage_workers", "Workers of a stage that have reported.", tag_keys=("stage", RUN)
)
COMMIT_S = Histogram(
    "blip2_commit_seconds",
    "Seconds that merging a shard into its file has taken.",
    boundaries=[0.1, 0.3, 1, 3, 10, 30, 100, 300],
    tag_keys=(RUN,),
)
MODEL_LOAD_S = Histogram(
    "blip2_model_load_seconds",
    "Seconds from the start of a captioning worker to its engine's.",
    boundaries=[1, 3, 10, 30, 100, 300, 1000],
    tag_keys=(RUN,),
)
STORE_RETRIES = Counter(
    "blip2_store_retries",
    "Requests to the input or the output that have failed and are tried again.",
    ("place", RUN),
)
REPLAYED_CALLS = Counter(
    "blip2_replayed_calls", "Captioning calls whose process has died, run again.", (RUN,)
)
DEVICE_FAILURES = Counter(
    "blip2_device_failures", "Engines that have failed, and their processes with them.", (RUN,)
)
ALL: tuple[Metric, ...] = (
    *(ROWS, FRAGMENTS, SHARDS, STAGE_BUSY_S, STAGE_WORKERS, COMMIT_S, MODEL_LOAD_S),
    *(STORE_RETRIES, REPLAYED_CALLS, DEVICE_FAILURES),
)


def _label(run: str) -> None:
    for metric in ALL:
        metric.set_default_tags({RUN: run})


_label("")  # A label without a value would be refused.


def run_of_job() -> str:
    """Return the id of the run, which the job in Ray carries; "" without a job."""
    if not ray.is_initialized():
        return ""
    metadata = dict(worker.global_worker.core_worker.get_job_config().metadata)
    return metadata.get(RUN_ID, "")


def label_with_run() -> None:
    """Label the metrics of this process with the id of the run."""
    if ray.is_initialized():
        _label(run_of_job())


@contextmanager
def timed(seconds: Histogram) -> Iterator[None]:
    """Observe how long the block takes, if it ends without an exception."""
    started = time.monotonic()
    yield
    seconds.observe(time.monotonic() - started)
