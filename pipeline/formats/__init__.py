"""How each kind of shard is read. A reader gives tables of the rows asked for, then a report.

No image is decoded here and no row is lost: where its bytes cannot be had, the row says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa

from pipeline.formats import folder, parquet, webdataset
from pipeline.formats.columns import Columns, option_of
from pipeline.formats.rows import member_type
from pipeline.inputs.reader import ReadOptions, ShardWork, Tables
from pipeline.inputs.shards import Format, InputError, Shard

NOT_OF_FOLDERS = {
    "image_column": "--image-column",
    "prompt_column": "--prompt-column",
    "text_columns": "--text-column or --score",
    "keep": "--keep",
}
"""Options that name columns or members, by the flags that set them."""
SAMPLES_LOOKED_AT = 16
"""Of a tar, to learn which members its samples have,"""
TARS_LOOKED_AT = 4
"""and of so many tars at most."""

READERS: dict[Format, Callable[[ShardWork, ReadOptions], Tables]] = {
    "webdataset": webdataset.read,
    "parquet": parquet.read,
    "folder": folder.read,
}


def read_shard(work: ShardWork, options: ReadOptions) -> Tables:
    """Tables of the rows asked for, in order; the ShardReport is the generator's return value."""
    return READERS[work.shard.format](work, options)


def count_rows(shard: Shard, at_most: int) -> int:
    """Rows of a shard, or that number when there are more: by the file's own account, or by walking a tar."""
    if shard.num_rows is not None:
        return min(shard.num_rows, at_most)
    if shard.format == "parquet":
        return min(parquet.count_rows(shard), at_most)
    return webdataset.count_rows(shard, at_most)


def check_options(shards: Sequence[Shard], options: ReadOptions) -> list[pa.Field]:
    """Refuse, before anything is read, options that the shards cannot meet; describe the kept columns.

    Raises:
        InputError: a column is not there or has a type that does not fit, no image column is found,
            or an option means nothing to these shards.
    """
    formats = {shard.format for shard in shards}
    if options.key_column is not None and "parquet" not in formats:
        raise InputError(
            f"key_column must be left out without Parquet tables, got {options.key_column!r}; "
            "the key of a file is its path"
        )
    if formats == {"folder"}:
        for name, flag in NOT_OF_FOLDERS.items():
            if value := getattr(options, name):
                named = value if isinstance(value, str) else ", ".join(value)
                raise InputError(
                    f"{flag} must name nothing in folders of files, which hold images and no texts, "
                    f"got {named}; put both into tars or a table"
                )
    _check_members([shard for shard in shards if shard.format == "webdataset"], options)
    for shard in shards:
        if shard.format == "parquet":
            columns = Columns.find(parquet.schema_of(shard), options)
            return [field.with_name(name) for name, field in columns.kept.items()]
    return [pa.field(name, member_type(source)) for name, source in options.kept.items()]


def _check_members(tars: Sequence[Shard], options: ReadOptions) -> None:
    """Refuse members that none of the first samples has: every row would be without, and most of them ok.

    A further tar is opened only where those before it have not shown everything.
    """
    named = [(option_of(name), source) for name, source in options.texts.items()]
    named += [("keep", source) for source in options.kept.values()]
    if options.image_column is not None:
        named.append(("image_column", options.image_column))
    found: dict[str, None] = {}
    num_samples = 0
    for tar in tars[:TARS_LOOKED_AT]:
        if all(source.lower() in found for _, source in named):
            return
        samples = webdataset.first_members(tar, SAMPLES_LOOKED_AT)
        num_samples += len(samples)
        found |= dict.fromkeys(extension for members in samples for extension in members)
    for option, source in named:
        if found and source.lower() not in found:
            where = tars[0].uri if len(tars) == 1 else f"the first tars, from {tars[0].uri} on,"
            raise InputError(
                f"{option} must be a member of the samples, got {source!r}; "
                f"the first {num_samples} of {where} have {', '.join(found)}"
            )
