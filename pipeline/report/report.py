"""The command `blip2 report`: read an output once, then print a summary and write a page, JSON or a card.

The output alone is read: the ledger, the footers and the rows of the finished files, one row group at a
time, and then the chosen rows again with all columns but the vectors. Only thumbnails need the input, which
is read again for these rows. The command needs no Ray and no model.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.attempts.store import read_attempts
from pipeline.exit_status import ExitStatus, before_work, errors_to_exit_status
from pipeline.ledger.layout import output_name
from pipeline.ledger.ledger import Ledger
from pipeline.page.thumbnails import thumbnails_of_run
from pipeline.progress import Console, count, write_json
from pipeline.report.as_json import report_json
from pipeline.report.card import dataset_card
from pipeline.report.model import Report, Sample, outputs_of
from pipeline.report.page import render_page
from pipeline.report.samples import SampleChooser
from pipeline.report.statistics import COUNTED_COLUMNS, Statistics
from pipeline.result_file import result_file
from pipeline.settings.report_settings import ReportSettings
from pipeline.storage.folder import Folder

MAX_NORMS = 20_000
"""Vectors whose norms are counted; they come from the row groups of the sampled rows."""


@errors_to_exit_status
def report(settings: ReportSettings) -> int:
    """Print a summary, and write the files that the settings name."""
    with before_work(type(settings)):
        html = result_file("html", settings.html) if settings.html is not None else None
        card = result_file("card", settings.card) if settings.card is not None else None
        found = make_report(settings.output, settings.thumbnails if html else 0)
    console = Console(sys.stderr if settings.json else sys.stdout)
    if settings.json:
        write_json(report_json(found))
    else:
        for line in found.lines():
            console.result(line)
    if html:
        html.write_text(render_page(found), encoding="utf-8", errors="backslashreplace")
        pictures = count(len(found.thumbnails), "thumbnail")
        console.say(f"page: {settings.html}, with {pictures} read from the input")
    if card:
        card.write_text(dataset_card(found), encoding="utf-8", errors="backslashreplace")
        console.say(f"card: {settings.card}")
    return ExitStatus.DONE


def make_report(uri: str, num_thumbnails: int = 0) -> Report:
    """Read an output folder.

    Args:
        uri: the output folder.
        num_thumbnails: maximum number of thumbnails; 0 leaves the input alone.

    Raises:
        ValueError: the folder holds no run, or the run has not finished a shard yet.
    """
    folder = Folder(uri)
    ledger = Ledger(folder)
    run = ledger.require_run()
    done = ledger.reconcile(run, ledger.of(run).scan())
    if not done.summaries:
        raise ValueError(f"{folder} has no finished shard yet; run the report again later")
    outputs = outputs_of(run)
    reading = _Reading(folder, Statistics(outputs.asks, outputs.scores), SampleChooser())
    for summary in done.summaries:
        reading.count(summary.shard)
    samples, norms = reading.samples(outputs.embeds)
    return Report(
        output=str(folder),
        run=run,
        reconciliation=done,
        statistics=reading.statistics,
        samples=samples,
        norms=norms,
        thumbnails=thumbnails_of_run(run, [sample.row for sample in samples], num_thumbnails),
        max_thumbnails=num_thumbnails,
        attempts=read_attempts(folder),
    )


@dataclass(frozen=True)
class _RowGroup:
    """A row group of a finished file, and the number of its first row in the whole output."""

    shard: str
    group: int
    start: int


@dataclass
class _Reading:
    """The two passes over an output: all rows in a few columns, then a few rows in all but the vectors."""

    folder: Folder
    statistics: Statistics
    chooser: SampleChooser
    groups: list[_RowGroup] = field(default_factory=list)

    def count(self, shard: str) -> None:
        """Count the rows of one finished file."""
        wanted = [*COUNTED_COLUMNS, *self.statistics.answers, *self.statistics.scores]
        with self.folder.open(output_name(shard)) as file:
            parquet = pq.ParquetFile(file)
            columns = [name for name in dict.fromkeys(wanted) if name in parquet.schema_arrow.names]
            for group in range(parquet.num_row_groups):
                start = self.statistics.num_rows
                self.groups.append(_RowGroup(shard, group, start))
                rows = parquet.read_row_group(group, columns=columns)
                self.chooser.add(rows, start)
                self.statistics.add(rows)

    def samples(self, vectors: Mapping[str, str]) -> tuple[list[Sample], dict[str, Counter[float]]]:
        """Read the chosen rows without their vectors; count the norms of the vectors around them."""
        chosen = self.chooser.chosen()
        rows: dict[int, Mapping[str, Any]] = {}
        norms: dict[str, Counter[float]] = {name: Counter() for name in vectors}
        for group, numbers in self._row_groups(sorted(chosen)):
            counted = {name for name, counts in norms.items() if counts.total() < MAX_NORMS}
            table = self._read(group, norms.keys() - counted)
            for name in counted.intersection(table.column_names):
                norms[name].update(_norms(table[name].slice(0, MAX_NORMS - norms[name].total())))
                table = table.drop_columns(name)
            picked = table.take([number - group.start for number in numbers]).to_pylist()
            rows.update(zip(numbers, picked, strict=True))
        return [Sample(rows[number], groups) for number, groups in chosen.items()], norms

    def _read(self, group: _RowGroup, without: Set[str]) -> pa.Table:
        with self.folder.open(output_name(group.shard)) as file:
            parquet = pq.ParquetFile(file)
            columns = [name for name in parquet.schema_arrow.names if name not in without]
            return parquet.read_row_group(group.group, columns=columns)

    def _row_groups(self, numbers: list[int]) -> Iterator[tuple[_RowGroup, list[int]]]:
        """Yield the row groups with some rows, and these rows."""
        starts = [group.start for group in self.groups]
        found = np.searchsorted(starts, numbers, side="right") - 1
        wanted: dict[int, list[int]] = {}
        for index, number in zip(found.tolist(), numbers, strict=True):
            wanted.setdefault(index, []).append(number)
        for index, of_group in wanted.items():
            yield self.groups[index], of_group


def _norms(column: pa.ChunkedArray) -> dict[float, int]:
    """Count the norms of vectors, or of lists of vectors taken as one, to two digits."""
    norms: Counter[float] = Counter()
    for vectors in column.drop_null().chunks:
        values = vectors.flatten()
        if pa.types.is_nested(values.type):
            values = values.flatten()
        if len(vectors):
            squares = np.square(pc.cast(values, pa.float64()).to_numpy(zero_copy_only=False))
            sums = squares.reshape(len(vectors), -1).sum(axis=1)
            norms.update(np.round(np.sqrt(sums[np.isfinite(sums)]), 2).tolist())
    return norms
