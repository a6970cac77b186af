"""The command `blip2 export`: write the finished shards of a run in another format.

Each shard becomes one file, or one folder, which is there as a whole or not at all. The same command leaves
alone what is up to date, and writes again the shards whose rows have changed since, for example by a retry.
One row group and one image at a time are in memory. The command needs no Ray and no model.
"""

from __future__ import annotations

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

TABLES = {"csv": write_csv, "jsonl": write_jsonl, "txt": write_txt}


@errors_to_exit_status
def export(settings: ExportSettings) -> int:
    """Write what is not up to date, shard by shard."""
    console = Console()
    with before_work(type(settings)):
        found = FinishedRows.find(settings.output, settings.input)
        if settings.to not in TABLES:
            require_same_input(found, settings.input)
        destination = Destination.begin(settings.into, settings.to, found)
    shards = {shard.name: shard for shard in found.run.shards}
    num_written = 0
    with destination:
        for shard in found.shards:
            if destination.is_up_to_date(shard):
                continue
            num_rows = _write(settings.to, destination, found, shards[shard])
            destination.finish(shard)
            num_written += 1
            name, num_left_out = destination.name_of(shard), found.num_rows(shard) - num_rows
            without = f", without {num_left_out:,} that are not ok" if num_left_out else ""
            console.say(f"{name}: {count(num_rows, 'row')}{without}")
            console.event("shard", name=name, num_rows=num_rows, num_left_out=num_left_out)
        if settings.to == "imagefolder":
            finish_imagefolder(destination, found.shards)
    num_kept = len(found.shards) - num_written
    console.say(
        f"{settings.into}: {count(len(found.shards), 'shard')}"
        + (f", {num_kept:,} of them were up to date" if num_kept else "")
    )
    if not found.is_whole:
        left = len(found.run.shards) - len(found.shards)
        console.warn(f"{left:,} shards of the run have no file yet; export again when the run has finished")
    return ExitStatus.DONE


def _write(to: str, destination: Destination, found: FinishedRows, shard: Shard) -> int:
    """Write one shard, and return the number of its rows."""
    if to in TABLES:
        with destination.file(shard.name) as file:
            return TABLES[to](file, found, shard.name)
    rows = ImageRows.of(found, shard)
    if to == "webdataset":
        with destination.file(shard.name) as file:
            return write_webdataset(file, rows)
    with destination.folder(shard.name) as folder:
        return write_imagefolder(folder, destination.name_of(shard.name), rows)
