"""Read WebDataset tars: one sample is one row, by the rule of `pipeline.inputs.formats.samples`.

Damage costs the sample that it hits and all samples after it: the rows of a tar that ends early are exactly
the first rows of the whole tar. Nothing after damage is read, because its rows would get other numbers
once the tar is repaired. A tar is read in order and without a choice, so the same work gives the same
tables.
"""

from __future__ import annotations

import tarfile

from blip2_actor import Status
from pipeline.inputs.formats.addresses import folder_of, refusal, resolve
from pipeline.inputs.formats.rows import TableBuilder, escape_name, member_types, member_values
from pipeline.inputs.formats.samples import Sample, SampleReader
from pipeline.inputs.formats.tar import TAR_ERRORS, check_after_end, open_archive, open_file, open_tar
from pipeline.inputs.reader import ADDRESS, MEMBER, ReadOptions, ShardReport, ShardWork, Tables
from pipeline.inputs.shards import Shard


def read(work: ShardWork, options: ReadOptions) -> Tables:
    """Yield the samples asked for. A tar that ends early or is damaged is read up to that place."""
    shard = work.shard
    table = TableBuilder(shard.name, options, member_types(options))
    reader = SampleReader(options, work.wants)
    reason, folder = None, folder_of(shard.root, shard.files[0])
    try:
        with open_tar(shard) as archive:
            for sample in reader.read(archive):
                for row in range(sample.first_row, shard.limit_rows(reader.num_rows)):
                    if work.wants(row):
                        table.add(row, _values(sample, row, folder, options))
                        if table.is_full:
                            yield table.take()
                if shard.limit_rows(reader.num_rows) == shard.max_rows:
                    break
            else:
                reason = reader.misplaced or check_after_end(archive)
    except TAR_ERRORS as error:
        reason = str(error) or type(error).__name__
    if len(table):
        yield table.take()
    return ShardReport(
        shard=shard.name,
        num_rows=shard.limit_rows(reader.num_rows),
        complete=reason is None,
        reason=reason and f"{shard.uri}: {escape_name(reason)}",
        note=reader.note and escape_name(reader.note),
    )


def scan_first_rows(shard: Shard, max_rows: int, options: ReadOptions) -> tuple[int, int | None]:
    """Scan the headers of the first samples of a tar.

    Returns:
        The number of rows of whole samples, `max_rows` or a few more, and the bytes of the file that they
        take. The bytes are None if the tar holds no further sample.
    """
    reader = SampleReader(options.images_only, lambda row: False)
    try:
        with open_file(shard) as file:
            for _ in reader.read(open_archive(file)):
                if reader.num_rows >= max_rows:
                    # The header of the next sample has been read already.
                    return reader.num_rows, max(1, file.tell() - tarfile.BLOCKSIZE)
    except TAR_ERRORS:
        pass  # Reading the shard will say what is wrong; the rows before it count.
    return reader.num_rows, None


def first_extensions(shard: Shard, max_samples: int) -> list[list[str]]:
    """Return the extensions of the members of the first samples; fewer if the tar cannot be read."""
    found: list[list[str]] = []
    try:
        with open_tar(shard) as archive:
            for sample in SampleReader(ReadOptions(), lambda row: False).read(archive):
                found.append(list(sample.extensions))
                if len(found) == max_samples:
                    break
    except TAR_ERRORS:
        pass  # Reading the shard will say what is wrong.
    return found


def _values(sample: Sample, row: int, folder: str, options: ReadOptions) -> dict[str, object]:
    """Return the columns of a row of a sample. A sample without an image says so in its status."""
    found = sample.images[row - sample.first_row] if sample.images else None
    image, status, error = (found.image, found.status, found.error) if found else (None, None, None)
    address = None
    if status is None:
        status, error = sample.status, sample.error
    if status is not None:
        image = None
    elif found is None:
        status = Status.MISSING_IMAGE
        error = f"the sample has no image among its members: {', '.join(sample.extensions)}"
    elif not image:
        image, status, error = None, Status.MISSING_IMAGE, f"{found.name} is empty"
    elif options.fetch:
        written, image = image.decode(errors="replace").strip(), None
        error = refusal(written, folder)
        status, address = (Status.REFUSED, None) if error else (None, resolve(written, folder))
    return {
        "key": escape_name(sample.key, options.schema_version),
        "image": image,
        "status": status,
        "error": error and escape_name(error, options.schema_version),
        MEMBER: found and escape_name(found.name, options.schema_version),
        ADDRESS: address,
        **member_values(sample.members, options),
    }
