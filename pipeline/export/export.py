"""The command `blip2 export`: write the finished shards of a run in another format.

Each shard becomes one file, or one folder, which is there as a whole or not at all. The same command leaves
alone what is up to date, writes again the shards whose rows have changed since, for example by a retry, and
deletes what it had written of shards that the run no longer has. One row group and one image at a time are in
memory. The command needs no Ray and no model.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.exit_status import ExitStatus, before_work, errors_to_exit_status
from pipeline.export.destination import Destination
from pipeline.export.image_rows import ImageRows, require_same_input
from pipeline.export.imagefolder import finish_imagefolder, write_imagefolder
from pipeline.export.tables import write_csv, write_jsonl, write_txt
from pipeline.export.webdataset import write_webdataset
from pipeline.inputs.shards import Shard
from pipeline.progress import Console, count
from pipeline.report.rows import FinishedRows
from pipeline.settings.report_settings import ExportSettings

NUM_NAMED = 5
"""Rows of a shard that are named when they have lost their images."""
TABLES = {"csv": write_csv, "jsonl": write_jsonl, "txt": write_txt}


@errors_to_exit_status
def export(settings: ExportSettings) -> int:
    """Write what is not up to date, shard by shard."""
    console = Console()
    with before_work(type(settings)):
        found = FinishedRows.find(settings.output, settings.input)
        if settings.to == "txt" and found.shards and "caption" not in found.schema().names:
            raise ValueError(
                f"to must not be txt for a run without captions, got {settings.output}; use jsonl"
            )
        if settings.to not in TABLES:
            require_same_input(found, settings.input)
        destination = Destination.begin(settings.into, settings.to, found)
    shards = {shard.name: shard for shard in found.run.shards}
    num_written = num_lost = 0
    with destination:
        for shard in found.shards:
            if destination.is_up_to_date(shard):
                continue
            destination.start(shard)
            num_rows, lost = _write(settings.to, destination, found, shards[shard])
            destination.finish(shard, is_whole=not lost)
            num_written += 1
            num_lost += len(lost)
            _tell(console, destination.name_of(shard), num_rows, found.num_rows(shard) - num_rows, lost)
        destination.drop_others(shards)
        if settings.to == "imagefolder":
            finish_imagefolder(destination, found.shards)
    num_kept = len(found.shards) - num_written
    console.say(
        f"{settings.into}: {count(len(found.shards), 'shard')}"
        + (f", {num_kept:,} of them up to date" if num_kept else "")
    )
    if found.unfinished:
        console.warn(f"{found.unfinished}; export again when the run has finished")
    if not num_lost:
        return ExitStatus.DONE
    console.fail(
        f"exit status 2: {count(num_lost, 'row')} left out without their images; restore the input, and run "
        "the same command to add them"
    )
    return ExitStatus.TOO_MANY_FAILURES


def _write(to: str, destination: Destination, found: FinishedRows, shard: Shard) -> tuple[int, Sequence[str]]:
    """Write one shard; return the number of its rows, and those that have lost their images."""
    name = destination.name_of(shard.name)
    if to in TABLES:
        with destination.file(name) as file:
            TABLES[to](file, found.folder, shard.name)
        return found.num_rows(shard.name), ()
    rows = ImageRows(found, shard)
    if to == "webdataset":
        with destination.file(name) as file:
            return write_webdataset(file, rows), rows.lost
    with destination.folder(shard.name) as folder:
        return write_imagefolder(folder, name, rows), rows.lost


def _tell(console: Console, name: str, num_rows: int, num_left_out: int, lost: Sequence[str]) -> None:
    """Say what a shard has become, and name rows that have lost their images."""
    num_not_ok = num_left_out - len(lost)
    without = f"; {num_not_ok:,} left out, not ok" if num_not_ok else ""
    without += f"; {len(lost):,} left out, image lost" if lost else ""
    console.say(f"{name}: {count(num_rows, 'row')}{without}")
    for row in lost[:NUM_NAMED]:
        console.warn(f"  {row}")
    if len(lost) > NUM_NAMED:
        console.warn(f"  and {len(lost) - NUM_NAMED:,} more")
    console.event("shard", name=name, num_rows=num_rows, num_left_out=num_left_out, num_lost=len(lost))
