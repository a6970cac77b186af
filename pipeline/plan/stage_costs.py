"""The stages of the job on a sample, one after the other in this process, and what each costs a row."""

from __future__ import annotations

import dataclasses
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blip2_actor import EngineBuilder, Status
from pipeline.inputs.reader import ShardReport
from pipeline.ledger.commit import commit_shard
from pipeline.ledger.fragments import write_fragment
from pipeline.ledger.layout import PLAN_FOLDERS, STATE, SUFFIX, output_name
from pipeline.plan.sample import Cost, Sample
from pipeline.settings.settings import CaptionSettings
from pipeline.stages.decode import DecodeStage
from pipeline.stages.write import caption_stage, contract
from pipeline.storage.folder import ASIDE, Folder

MIN_S = 1.0
"""A shorter pass says little; it is repeated with more rows."""
LONG_S = 10.0
"""After a first pass this long, whatever was slow only once hardly shows."""
MAX_ROWS = 4096


@dataclass(frozen=True)
class StageCosts:
    """What came out, and what it cost."""

    rows: pa.Table
    """The sample as it would stand in the output."""
    costs: dict[str, Cost]
    """By stage; of decode and write in one worker, of caption in one actor."""
    start_s: float
    """Until the engine was ready."""
    row_bytes: float
    """Of the output, per row,"""
    file_bytes: int
    """and per file on top of its rows."""


def measure_stage_costs(
    settings: CaptionSettings, engine: EngineBuilder, size_px: int, sample: Sample
) -> StageCosts:
    """Decode, caption and write the sample.

    Raises:
        ValueError: no image of it can be captioned.
    """
    decoding = DecodeStage(size_px, settings.limits, "image")
    decode = lambda table: pa.concat_tables(decoding(table))  # noqa: E731
    decode(sample.rows.slice(0, 1))  # Starts the child.
    decoded, decode_cost = _timed(decode, sample.rows)
    # The child computes or waits for its next image, which is always there.
    decode_cost = Cost(decode_cost.wall_s, max(decode_cost.wall_s, decode_cost.cpu_s))
    readable = decoded.filter(pc.equal(decoded["status"], Status.OK.value))
    if not len(readable):
        error = decoded["error"][0].as_py()
        raise ValueError(
            f"input must have images that can be decoded, got none in {len(decoded)} sampled rows ({error}); "
            "look at the input, or take a larger --sample"
        )
    started = perf_counter()
    # Rows come again here that would not in the job.
    captioning = caption_stage(engine, dataclasses.replace(settings, reuse_identical=False))
    start_s = perf_counter() - started
    try:
        captioning(readable.slice(0, 1))
        captioned, caption_cost = _timed(captioning, decoded)
    finally:
        captioning.close()
    rows = contract(captioned, list(settings.reading.kept), captioning)
    with _folder_for_plan(settings.output) as folder:
        write_cost, row_bytes, file_bytes = _write(folder, rows)
    costs = {"read": sample.cost, "decode": decode_cost, "caption": caption_cost, "write": write_cost}
    return StageCosts(rows, costs, start_s, row_bytes, file_bytes)


def _timed(stage: Callable[[pa.Table], pa.Table], table: pa.Table) -> tuple[pa.Table, Cost]:
    """The result on a table, and the cost on so many times its rows that start and end hardly show."""
    result, wall_s, cpu_s = _once(stage, table)
    while wall_s < LONG_S:
        _, wall_s, cpu_s = _once(stage, table)
        if wall_s >= MIN_S or 4 * len(table) > MAX_ROWS:
            break
        table = pa.concat_tables([table] * 4).combine_chunks()
    return result, Cost(wall_s / len(table), cpu_s / len(table))


def _once(stage: Callable[[pa.Table], pa.Table], table: pa.Table) -> tuple[pa.Table, float, float]:
    started, cpu_started = perf_counter(), process_time()
    result = stage(table)
    return result, perf_counter() - started, process_time() - cpu_started


def _write(folder: Folder, rows: pa.Table) -> tuple[Cost, float, int]:
    """Write the rows as a fragment, commit them as a shard, and look at its file."""
    shard: Any = "sample"
    numbered = rows.set_column(
        rows.column_names.index("row"), rows.schema.field("row"), pa.array(range(len(rows)))
    )
    numbered = numbered.set_column(
        rows.column_names.index("shard"), rows.schema.field("shard"), pa.array([shard] * len(rows))
    )

    def write(table: pa.Table) -> pa.Table:
        write_fragment(folder, table)
        commit_shard(folder, ShardReport(shard=shard, num_rows=len(table), complete=True), {})
        return table

    _, wall_s, cpu_s = _once(write, numbered)
    content = folder.get(output_name(shard)) or b""
    metadata = pq.read_metadata(pa.BufferReader(content))
    groups = [metadata.row_group(at) for at in range(metadata.num_row_groups)]
    row_bytes = sum(g.column(c).total_compressed_size for g in groups for c in range(g.num_columns))
    return Cost(wall_s / len(rows), cpu_s / len(rows)), row_bytes / len(rows), len(content) - row_bytes


@contextmanager
def _folder_for_plan(output: str) -> Iterator[Folder]:
    """A place in the output that no run looks at, or a temporary folder; gone afterwards."""
    if not output:
        with tempfile.TemporaryDirectory() as path:
            yield Folder(path)
        return
    whole = Folder(output)
    new = [path for path in (Path(whole.root), *Path(whole.root).parents) if not path.exists()]
    whole.require_writable()
    folder = _PlanFolder(whole.below(f"{PLAN_FOLDERS}{uuid.uuid4().hex}").uri)
    try:
        yield folder
    finally:
        folder.erase()
        whole.drop_if_empty(ASIDE)
        whole.drop_if_empty(STATE)
        for made in new if whole.is_local else ():
            with suppress(OSError):
                made.rmdir()


class _PlanFolder(Folder):
    """No name in it ends in .parquet: what a killed plan leaves must not pass for results."""

    def path(self, name: str) -> str:
        path = super().path(name)
        return f"{path}~" if name.endswith(SUFFIX) else path
