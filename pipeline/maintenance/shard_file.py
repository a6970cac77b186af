"""Check the file of a finished shard: read it whole, and compare its rows with its footer and its shard.

One row group is in memory at a time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blip2_actor import Status
from pipeline.finding import Finding
from pipeline.inputs.formats.rows import escape_name
from pipeline.inputs.shards import Shard
from pipeline.ledger.commit import RUN_KEY, SUMMARY_KEY, Summary, summary_in
from pipeline.ledger.layout import output_name
from pipeline.ledger.run_record import Run
from pipeline.progress import count
from pipeline.schema import CAPTION_COLUMNS, FINGERPRINT_KEY, ROW_CONTRACT
from pipeline.settings.fingerprint import MAX_SHOWN, Fingerprint
from pipeline.storage.folder import Folder

OPTIONAL = (*CAPTION_COLUMNS, "member")
"""Columns of the row contract that some runs do not have."""


def check_shard_file(folder: Folder, run: Run, shard: Shard) -> tuple[Summary | None, Finding | None]:
    """Read the file of a finished shard.

    Returns:
        What its footer says, None if it cannot be read or is the footer of another shard or run; and what is
        wrong with the file.
    """
    name = output_name(shard.name)
    summary: Summary | None = None
    remedy = _again(name)
    try:
        with folder.open(name) as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            metadata = parquet.metadata.metadata or {}
            if SUMMARY_KEY in metadata:
                footer = summary_in(metadata)
                found, remedy = _footer_fault(metadata, footer, run, shard)
                if not found:
                    summary = footer
                    found = "; ".join(_row_faults(parquet, footer, run, shard))
            else:
                found = "has no footer of a run"
    except FileNotFoundError:
        found, remedy = "has gone while it was checked", "verify the output again"
    except (OSError, pa.ArrowException, ValueError, TypeError, KeyError) as error:
        said = str(error).removeprefix(f"{name} in {folder} cannot be read: ")
        found = f"cannot be read: {' '.join(said.split())}"
        remedy = f"if the store has failed, verify again; else {remedy}"
    return summary, Finding(name, "fail", found, remedy) if found else None


def _again(name: str) -> str:
    return f"delete {name} and run the same command again, which makes the shard again"


def _footer_fault(
    metadata: Mapping[bytes, bytes], summary: Summary, run: Run, shard: Shard
) -> tuple[str, str]:
    """Return how the footer contradicts the run or the shard, "" if it does not, and the remedy."""
    again = _again(output_name(shard.name))
    if metadata.get(FINGERPRINT_KEY, b"").decode() != run.fingerprint.digest:
        theirs = Fingerprint(json.loads(metadata.get(RUN_KEY, b"{}")))
        differences = "; ".join(theirs.differences(run.fingerprint)[:MAX_SHOWN])
        return f"was made with other settings than the run: {differences}", again
    if summary.shard != shard.name:
        own = output_name(summary.shard)
        remedy = f"give it the name {own} again if that file is not there or wrong too; else {again}"
        return f"holds the rows of the shard {summary.shard}", remedy
    if summary.generation != shard.generation:
        return "was made of another content of its input than the run has now", again
    return "", again


def _row_faults(parquet: pq.ParquetFile, summary: Summary, run: Run, shard: Shard) -> Iterator[str]:
    """Yield how the rows contradict the row contract, the footer and the listing.

    Of each kind of fault, only the first is told.
    """
    wrong_columns = list(_column_faults(parquet.schema_arrow))
    if wrong_columns:
        yield from wrong_columns
        return
    rows = _Rows(shard, shard.files if shard.format == "folder" and run.schema_version > 1 else None)
    for group in range(parquet.num_row_groups):
        rows.add(parquet.read_row_group(group))
    yield from rows.faults.values()
    if rows.num_rows != summary.num_rows:
        yield f"holds {count(rows.num_rows, 'row')}, and its footer says {summary.num_rows:,}"
    elif rows.by_status != Counter(dict(summary.by_status)):
        yield f"holds {_told(rows.by_status)}, and its footer says {_told(Counter(summary.by_status))}"
    listed = None if shard.num_rows is None else shard.limit_rows(shard.num_rows)
    if summary.complete and listed not in (None, rows.num_rows):
        yield f"holds {count(rows.num_rows, 'row')}, and its shard was listed with {listed:,}"


def _column_faults(schema: pa.Schema) -> Iterator[str]:
    for wanted in ROW_CONTRACT:
        if wanted.name not in schema.names:
            if wanted.name not in OPTIONAL:
                yield f"lacks the column {wanted.name}"
        elif not schema.field(wanted.name).type.equals(wanted.type):
            found = schema.field(wanted.name).type
            yield f"has the column {wanted.name} with the type {found} instead of {wanted.type}"


@dataclass
class _Rows:
    """The rows of one file as they are read: how many, with which statuses, and what is wrong."""

    shard: Shard
    files: Sequence[str] | None
    """The file of each row, whose name is its key; None if keys are not known before reading."""
    num_rows: int = 0
    by_status: Counter[str] = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)
    """The first fault of each kind."""

    def add(self, rows: pa.Table) -> None:
        """Check the next row group."""
        start, self.num_rows = self.num_rows, self.num_rows + len(rows)
        numbers = rows["row"].to_numpy()
        wrong = np.flatnonzero(numbers != np.arange(start, self.num_rows))
        if len(wrong):
            expected = start + int(wrong[0])
            after = f"after row {expected - 1}" if expected else "first"
            found = numbers[wrong[0]]
            self._tell("order", f"must hold the rows 0, 1, 2 and so on; {after} comes row {found}")
        if not pc.all(pc.equal(rows["shard"], self.shard.name)).as_py():
            self._tell("shard", "holds rows of another shard")
        if self.files is not None and not len(wrong):
            self._compare_keys(rows["key"].to_pylist(), start)
        statuses = rows["status"].value_counts().to_pylist()
        self.by_status.update({pair["values"]: pair["counts"] for pair in statuses})
        if "caption" in rows.column_names:
            is_ok = pc.equal(rows["status"], Status.OK.value)
            differ = pc.sum(pc.not_equal(is_ok, pc.is_valid(rows["caption"]))).as_py()
            if differ:
                self._tell("caption", "holds rows that are ok without a caption, or have one and are not ok")

    def _compare_keys(self, keys: list[str], start: int) -> None:
        assert self.files is not None
        for row, key in enumerate(keys, start):
            listed = escape_name(self.files[row]) if row < len(self.files) else None
            if key != listed:
                self._tell("key", f"has the key {key} in row {row}, where {listed} was listed")
                return

    def _tell(self, kind: str, fault: str) -> None:
        self.faults.setdefault(kind, fault)


def _told(by_status: Counter[str]) -> str:
    return " + ".join(f"{n:,} {status}" for status, n in sorted(by_status.items())) or "no row"
