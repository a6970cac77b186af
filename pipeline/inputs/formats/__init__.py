"""Read shards: one module per format, and the functions that choose among them.

A reader yields tables of the rows asked for, then returns a report. It decodes no image and loses no row: if
the bytes of an image are not available, the row says why. The same work gives the same tables every time.
Each module says what makes a row and what damage may cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.inputs.evenly_spaced import evenly_spaced
from pipeline.inputs.formats import folder, webdataset
from pipeline.inputs.formats.base64_text import HEAD_CHARS, looks_like_base64_image
from pipeline.inputs.formats.manifests import manifest
from pipeline.inputs.formats.rows import member_type
from pipeline.inputs.formats.tables import parquet
from pipeline.inputs.formats.tables.columns import Columns, is_text, option_name
from pipeline.inputs.formats.tables.kept import join_fields, with_types
from pipeline.inputs.formats.tables.texts import MAX_SHOWN_CHARS
from pipeline.inputs.reader import ReadOptions, ShardWork, Tables
from pipeline.inputs.shards import Format, Shard
from pipeline.schema import to_plain
from pipeline.storage.filesystems import at_once
from pipeline.storage.secrets import hide_secrets

OPTIONS_THAT_NEED_TEXTS = {
    "image_column": "--image-column",
    "prompt_column": "--prompt-column",
    "text_columns": "--text-column or --score",
    "keep": "--keep",
}
"""Options that name columns or members, which folders of images do not have, and the flags that set them."""
MAX_CHECKED_SAMPLES = 16
"""First samples of a tar that are read to learn which members the samples have."""
MAX_CHECKED_CELLS = 16
"""First cells of a column of text that are read to learn whether they are base64."""
MAX_CHECKED_TARS = 4
MAX_CHECKED_TABLES = 64
"""Tables, from all over the input, whose columns are compared with the options."""

READERS: dict[Format, Callable[[ShardWork, ReadOptions], Tables]] = {
    "webdataset": webdataset.read,
    "parquet": parquet.read,
    "folder": folder.read,
    "manifest": manifest.read,
}


def read_shard(work: ShardWork, options: ReadOptions, kept: pa.Schema | None = None) -> Tables:
    """Yield tables of the rows asked for, in order. The generator's return value is a `ShardReport`.

    Args:
        work: a shard, and which of its rows are wanted.
        options: which columns or members are read.
        kept: the kept columns as all files of the output have them; default: as the shard has them.
    """
    tables = READERS[work.shard.format](work, options)
    return with_types(tables, kept) if kept else tables


def count_rows(shard: Shard, max_rows: int, options: ReadOptions) -> int:
    """Count the rows of a shard up to a maximum: by a Parquet file's footer, or by scanning a tar."""
    if shard.num_rows is not None:
        return min(shard.num_rows, max_rows)
    if shard.format == "parquet":
        return min(parquet.count_rows(shard, options), max_rows)
    return min(webdataset.scan_first_rows(shard, max_rows, options)[0], max_rows)


def check_options(shards: Sequence[Shard], options: ReadOptions) -> pa.Schema:
    """Refuse options that the shards cannot satisfy, before any row is read.

    A table that is damaged, or does not fit the options, becomes a partial shard as long as another one fits.

    Returns:
        The kept columns, in order.

    Raises:
        InputError: a column does not exist or has the wrong type, no image column is found, or an option
            has no meaning for these shards.
    """
    formats = {shard.format for shard in shards}
    if options.key_column is not None and not formats & {"parquet", "manifest"}:
        raise InputError(
            f"--key-column needs Parquet tables or manifests, got {options.key_column!r} and none of them; "
            "leave it out, because the key of a file is its path"
        )
    if options.image_encoding == "base64" and "parquet" not in formats:
        raise InputError("--image-encoding base64 needs Parquet tables, got none; leave it out")
    if formats == {"folder"}:
        _refuse_texts(options)
    tars = [shard for shard in shards if shard.format == "webdataset"]
    if tars and options.fetch and options.image_column is None:
        raise InputError(
            "--fetch needs --image-column with tars: the ending of the members with a URL, as url"
        )
    _check_members(tars, options)
    tables = _one_of_each_file(shards, "parquet")
    found = _find_columns(tables, options) if tables else []
    _require_base64(found, options)
    manifests = _one_of_each_file(shards, "manifest")
    found += [(shard, manifest.columns_of(shard, options)) for shard in manifests]
    kept = []
    for name, source in options.kept.items():
        types = [(tars[0].uri, member_type(source))] if tars else []
        types += [(table.uri, columns.kept[name].type) for table, columns in found if name in columns.kept]
        if not types and found:
            names = ", ".join(found[0][1].all_names)
            raise InputError(f"keep must be one of the columns {names}, got {source!r}")
        kept.append(join_fields(name, types))
    return pa.schema(kept)


def _find_columns(tables: Sequence[Shard], options: ReadOptions) -> list[tuple[Shard, Columns]]:
    """Return the tables that fit the options, with their columns.

    Further tables are looked at until the type of every kept column is known.

    Raises:
        InputError: no table fits.
    """
    found: list[tuple[Shard, Columns]] = []
    errors: list[InputError] = []
    checked = evenly_spaced(tables, MAX_CHECKED_TABLES)
    first = {*checked}
    others = (table for table in tables if table not in first)
    while checked:
        results = at_once(lambda table: _columns_of(table, options), checked)
        for table, columns in zip(checked, results, strict=True):
            if isinstance(columns, InputError):
                errors.append(columns)
            else:
                found.append((table, columns))
        known = {n for _, c in found for n, field in c.kept.items() if not pa.types.is_null(field.type)}
        checked = [] if found and known >= {*options.kept} else list(islice(others, MAX_CHECKED_TABLES))
    if not found:
        raise errors[0]
    return found


def _one_of_each_file(shards: Sequence[Shard], format: Format) -> list[Shard]:
    return list({(shard.root, shard.files): shard for shard in shards if shard.format == format}.values())


def _require_base64(found: Sequence[tuple[Shard, Columns]], options: ReadOptions) -> None:
    """Refuse a column of text that holds something other than base64, such as URLs; nulls are ignored."""
    for table, columns in found:
        if options.image_encoding == "base64" or options.fetch or not is_text(columns.image_type):
            continue
        cells = to_plain(parquet.first_cells(table, columns.image.name, MAX_CHECKED_CELLS))
        cells = cells.flatten() if columns.has_lists and len(cells) else cells
        texts = [text for text in cells.cast(pa.string()).cast(pa.binary()).to_pylist() if text]
        if any(looks_like_base64_image(text[:HEAD_CHARS]) for text in texts):
            return
        if texts:
            shown = hide_secrets(texts[0].decode(errors="backslashreplace")[:MAX_SHOWN_CHARS])
            raise InputError(
                f"image_column must hold bytes or images in base64, got {columns.image.name!r} with "
                f"{shown!r}; add --fetch if it holds URLs or paths, --image-encoding base64 if it is base64"
            )


def _columns_of(table: Shard, options: ReadOptions) -> Columns | InputError:
    try:
        return Columns.find(parquet.schema_of(table), options)
    except InputError as error:
        return error


def _refuse_texts(options: ReadOptions) -> None:
    if options.fetch:
        raise InputError(
            "--fetch has no meaning for folders of files, which hold the images themselves; leave it out"
        )
    for name, flag in OPTIONS_THAT_NEED_TEXTS.items():
        if value := getattr(options, name):
            value = value if isinstance(value, str) else ", ".join(value)
            raise InputError(
                f"{flag} has no meaning for folders of files, which hold images and no texts, got {value}; "
                "put both into tars or a table"
            )


def _check_members(tars: Sequence[Shard], options: ReadOptions) -> None:
    """Refuse members that none of the first samples has.

    Every row would lack the member, and most rows would still be ok. A tar is opened only if the ones
    before it have not shown every member.
    """
    wanted = [(option_name(name), source) for name, source in options.texts.items()]
    wanted += [("keep", source) for source in options.kept.values()]
    if options.image_column is not None:
        wanted.append(("image_column", options.image_column))
    found: dict[str, None] = {}
    num_samples = 0
    for tar in tars[:MAX_CHECKED_TARS]:
        if all(source.lower() in found for _, source in wanted):
            return
        samples = webdataset.first_extensions(tar, MAX_CHECKED_SAMPLES)
        num_samples += len(samples)
        found |= dict.fromkeys(extension for extensions in samples for extension in extensions)
    for option, source in wanted:
        if found and source.lower() not in found:
            checked = tars[0].uri if len(tars) == 1 else f"the first tars, from {tars[0].uri} on,"
            raise InputError(
                f"{option} must be a member of the samples, got {source!r}; "
                f"the first {num_samples} samples of {checked} have {', '.join(found)}; "
                "name one of these, or sort the tar by name if its members are further back"
            )
