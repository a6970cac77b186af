"""Run the stages of the job on a sample, one after the other in this process, and measure what a row costs.

The stages are the job's own: the decode stage, the captioning stage, and the ledger that writes fragments
and commits shards. What they leave in the output is deleted. A plan that is killed cannot delete it, so
nothing there may pass for a result: see `WRITTEN_SAMPLE`.
"""

from __future__ import annotations

import dataclasses
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blip2_actor import EngineBuilder, ModelInfo, Status
from pipeline.inputs.reader import ShardReport
from pipeline.ledger.commit import RUN_KEY, commit_shard
from pipeline.ledger.fragments import write_fragment
from pipeline.ledger.layout import PLAN_FOLDERS, STATE
from pipeline.plan.cost import Cost, measure
from pipeline.plan.quantization import (
    Captioned,
    QuantizationEffect,
    compare,
    plain_spec,
    tensor_bytes,
)
from pipeline.plan.sample import Sample
from pipeline.settings.caption_spec import CaptionSpec
from pipeline.settings.job_settings import CaptionSettings
from pipeline.stages.caption import CaptionStage
from pipeline.stages.decode import DecodeStage
from pipeline.stages.fragment_writer import FRAGMENT_BYTES, FRAGMENT_ROWS
from pipeline.stages.output_rows import output_columns
from pipeline.storage.folder import ASIDE, Folder

MIN_S = 1.0
"""A shorter pass says little about the cost of a row, so it is repeated with more rows."""
LONG_S = 10.0
"""A first pass this long is not repeated: what is slow only once hardly shows in it."""
MAX_ROWS = 4096
WRITTEN_SAMPLE = "sample.parquet~"
"""Name of the file that a plan writes. It does not end in .parquet, because a glob such as `**/*.parquet`
must not take the file that a killed plan leaves behind for a result of the run."""


@dataclass(frozen=True)
class StageCosts:
    """The rows that the stages made of a sample, and what each stage cost."""

    rows: pa.Table
    """The sample as it would be in the output."""
    costs: dict[str, Cost]
    """The cost of one row by stage: in one actor for caption, and in one worker for the others."""
    start_s: float
    """Seconds until the engine was ready."""
    row_bytes: float
    """Bytes of the output per row."""
    file_bytes: int
    """Bytes of the output per file, in addition to its rows."""
    quantization: QuantizationEffect | None = None
    """What `--quantize` changes; None without it."""


def measure_stage_costs(
    settings: CaptionSettings, engine: EngineBuilder, info: ModelInfo, sample: Sample, rows_per_shard: int
) -> StageCosts:
    """Decode, caption and write a sample.

    Args:
        settings: the job.
        engine: the engine that captions.
        info: the model of the engine.
        sample: rows of the input, and what reading them cost.
        rows_per_shard: about how many rows a shard of the input has.

    Raises:
        ValueError: no image of the sample can be decoded.
    """
    decoded, decode_cost = _decode(settings, info.image_size_px, sample)
    # Timing repeats rows. The job would caption them once with this option, but here each one must count.
    spec = dataclasses.replace(settings.spec(engine), reuse_identical=False)
    plain = plain_spec(spec)
    captioned = _caption(spec, decoded, settings, counts_tensors=plain is not None)
    effect = None
    if plain is not None:
        effect = compare(spec, captioned, _caption(plain, decoded, settings, counts_tensors=True))
    rows = captioned.rows
    with _plan_folder(settings.output) as folder:
        metadata = {RUN_KEY: settings.fingerprint(info).canonical.encode()}
        _write(folder, rows, metadata)
        row_bytes, file_bytes = _written_bytes(folder, len(rows))
        write_cost = _write_cost(folder, rows, min(rows_per_shard, _rows_of_fragment(rows)), metadata)
    costs = {"read": sample.cost, "decode": decode_cost, "caption": captioned.cost, "write": write_cost}
    return StageCosts(rows, costs, captioned.start.wall_s, row_bytes, file_bytes, effect)


def _caption(
    spec: CaptionSpec, decoded: pa.Table, settings: CaptionSettings, *, counts_tensors: bool
) -> Captioned:
    """Start an engine, and caption decoded rows into rows of the output."""
    bytes_before = tensor_bytes() if counts_tensors else 0
    captioning, start = measure(CaptionStage, spec)
    engine_bytes = tensor_bytes() - bytes_before if counts_tensors else 0
    try:
        captioning(decoded.filter(_is_ok(decoded)).slice(0, 1))
        captioned, cost = _measure_per_row(captioning, decoded)
    finally:
        captioning.close()
    rows = output_columns(captioned, list(settings.reading.kept), captioning)
    return Captioned(rows, cost, start, engine_bytes)


def _decode(settings: CaptionSettings, size_px: int, sample: Sample) -> tuple[pa.Table, Cost]:
    with closing(DecodeStage(size_px, settings.limits, "image", fetch=settings.fetching)) as decoding:

        def decode(table: pa.Table) -> pa.Table:
            return pa.concat_tables(decoding(table))

        decode(sample.rows.slice(0, 1))  # This starts the child process, which must not count.
        decoded, cost = _measure_per_row(decode, sample.rows)
    if not pc.any(_is_ok(decoded)).as_py():
        error = decoded["error"][0].as_py()
        raise ValueError(
            f"none of the {len(decoded)} sampled images can be decoded ({error}); "
            "check the input, or take a larger --sample"
        )
    # The child decodes all the time, because its next image is always there, so its CPU time is the time
    # by the clock.
    return decoded, Cost(cost.wall_s, max(cost.wall_s, cost.cpu_s))


def _is_ok(rows: pa.Table) -> pa.ChunkedArray:
    return pc.equal(rows["status"], Status.OK.value)


def _measure_per_row(stage: Callable[[pa.Table], pa.Table], table: pa.Table) -> tuple[pa.Table, Cost]:
    """Run a stage on a table, and measure its cost per row.

    The stage runs again on copies of the rows until a pass takes long enough that its start and its end
    hardly count.
    """
    result, cost = measure(stage, table)
    while cost.wall_s < LONG_S:
        _, cost = measure(stage, table)
        if cost.wall_s >= MIN_S or 4 * len(table) > MAX_ROWS:
            break
        table = pa.concat_tables([table] * 4).combine_chunks()
    return result, cost.per_row(len(table))


def _write(folder: Folder, rows: pa.Table, metadata: Mapping[bytes, bytes]) -> None:
    """Write rows as a fragment, and commit them as a shard with this metadata in its footer."""
    columns = {"shard": ["sample"] * len(rows), "row": range(len(rows))}
    for name, values in columns.items():
        position = rows.column_names.index(name)
        rows = rows.set_column(position, rows.schema.field(name), pa.array(values))
    report = ShardReport(shard="sample", num_rows=len(rows), complete=True)
    write_fragment(folder, rows)
    commit_shard(folder, report, metadata, file_name=WRITTEN_SAMPLE)


def _written_bytes(folder: Folder, num_rows: int) -> tuple[float, int]:
    """Return the bytes of a row in the file that was written, and those of the file besides its rows."""
    content = folder.get(WRITTEN_SAMPLE) or b""
    metadata = pq.read_metadata(pa.BufferReader(content))
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    row_bytes = sum(g.column(c).total_compressed_size for g in groups for c in range(g.num_columns))
    return row_bytes / num_rows, len(content) - row_bytes


def _rows_of_fragment(rows: pa.Table) -> int:
    """Return how many such rows the job writes in one fragment."""
    num_fitting = FRAGMENT_BYTES * len(rows) // max(1, rows.nbytes)
    return min(FRAGMENT_ROWS, max(1, num_fitting))


def _write_cost(folder: Folder, rows: pa.Table, num_rows: int, metadata: Mapping[bytes, bytes]) -> Cost:
    """Return what writing a row costs in a fragment of `num_rows`, which share the cost of its files."""
    copies = rows.take(pa.array([number % len(rows) for number in range(num_rows)], pa.int64()))
    _, cost = measure(_write, folder, copies, metadata)
    return cost.per_row(num_rows)


@contextmanager
def _plan_folder(output: str) -> Iterator[Folder]:
    """Provide an empty folder, and delete it afterwards with all parents that did not exist before.

    It is a folder in the output that no run reads, or a temporary folder if no output is given.
    """
    if not output:
        with tempfile.TemporaryDirectory() as path:
            yield Folder(path)
        return
    whole = Folder(output)
    new = [path for path in (Path(whole.root), *Path(whole.root).parents) if not path.exists()]
    whole.require_writable()
    folder = whole.below(f"{PLAN_FOLDERS}{uuid.uuid4().hex}")
    try:
        yield folder
    finally:
        folder.erase()
        whole.drop_if_empty(ASIDE)
        whole.drop_if_empty(STATE)
        for created in new if whole.is_local else ():
            with suppress(OSError):
                created.rmdir()
