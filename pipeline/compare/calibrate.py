"""The command `blip2 calibrate`: fit the probability that a caption is right on a finished run.

A caption is right if it is one of its references, compared as `blip2 compare` does (lower case, without
punctuation), or if a person has judged so.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv

from blip2_actor import Calibration, fit_calibration
from pipeline.caption_counts import REGENERATED
from pipeline.compare.metrics import words_of
from pipeline.exit_status import ExitStatus, before_work, errors_to_exit_status
from pipeline.progress import Console, count, write_json
from pipeline.report.rows import FinishedRows
from pipeline.result_file import result_file
from pipeline.settings.report_settings import CalibrateSettings

COLUMNS = ["key", "caption", "logprob", "num_tokens", "flags", "status"]
LIMITS = (0.5, 0.7, 0.8, 0.9, 0.95)
"""Values of --min-confidence whose effect the command prints."""

Example = tuple[float, int]
"""Log-probability and number of tokens of a caption."""
Judge = Callable[[Mapping[str, Any]], bool | None]
"""Says whether the caption of a row is right; None if unknown."""


@errors_to_exit_status
def command(settings: CalibrateSettings) -> int:
    """Fit a calibration and write it to a file."""
    with before_work(type(settings)):
        into = result_file("into", settings.into)
        rows = FinishedRows.find(settings.output)
        examples, is_right = read_examples(rows, settings)
        calibration = fit_calibration(examples, is_right, made_by(rows))
    calibration.save(into)
    console = Console(sys.stderr if settings.json else sys.stdout)
    if rows.unfinished:
        console.warn(f"{rows.unfinished}; captions of finished shards are counted")
    if settings.json:
        write_json(json.dumps(dataclasses.asdict(calibration), indent=1))
    else:
        for line in lines_of(calibration, examples, is_right):
            console.result(line)
    console.say(f"{settings.into}: blip2 caption --calibration {settings.into} adds the column confidence")
    return ExitStatus.DONE


def read_examples(rows: FinishedRows, settings: CalibrateSettings) -> tuple[list[Example], list[bool]]:
    """Return the captions of a run whose truth is known, and whether each is right.

    Raises:
        ValueError: the run has no captions, or there is no such column or file.
    """
    names = rows.schema().names
    if "caption" not in names:
        raise ValueError(f"output must be a run with captions, got {rows.folder}")
    if settings.reference is not None and settings.reference not in names:
        raise ValueError(
            f"reference must be a column of the run, got {settings.reference}; name a column that was kept "
            "with --keep"
        )
    column = settings.reference
    judge = _by_file(settings.judged) if settings.judged is not None else _by_column(str(column))
    examples, is_right = list[Example](), list[bool]()
    for table in rows.tables(COLUMNS if column is None else [*COLUMNS, column]):
        for row in table.to_pylist():
            if row["status"] != "ok" or REGENERATED in row["flags"] or not math.isfinite(row["logprob"]):
                continue
            right = judge(row)
            if right is not None:
                examples.append((row["logprob"], row["num_tokens"]))
                is_right.append(right)
    return examples, is_right


def made_by(rows: FinishedRows) -> dict[str, Any]:
    """Return what a calibration must know of the run that has made its captions."""
    parts = rows.run.fingerprint.parts
    return {
        "model": parts["model"],
        "prompt": parts["prompt"] or None,
        "row_prompts": parts["columns"]["prompt"] is not None,
        "options": parts["options"],
    }


def lines_of(
    calibration: Calibration, examples: Sequence[Example], is_right: Sequence[bool]
) -> Iterator[str]:
    """Yield the lines for the terminal."""
    yield f"{count(calibration.num_examples, 'caption')} with a known truth, {calibration.accuracy:.1%} right"
    yield (
        f"on captions held out: calibration error {calibration.calibration_error:.3f}, "
        f"AUROC {calibration.auroc:.3f}"
    )
    confidences = [calibration.probability(*example) for example in examples]
    for limit in LIMITS:
        kept = [right for confidence, right in zip(confidences, is_right, strict=True) if confidence >= limit]
        if kept:
            yield (
                f"--min-confidence {limit:g} keeps {len(kept) / calibration.num_examples:.1%} of them, "
                f"of which {sum(kept) / len(kept):.1%} are right"
            )


def _by_column(column: str) -> Judge:
    """Judge by a column with the right caption, a list of them, or true and false."""

    def judge(row: Mapping[str, Any]) -> bool | None:
        value = row[column]
        if value is None or isinstance(value, bool):
            return value
        texts = [text for text in (value if isinstance(value, list) else [value]) if str(text or "").strip()]
        return words_of(row["caption"]) in {words_of(str(text)) for text in texts} if texts else None

    return judge


def _by_file(path: str) -> Judge:
    """Judge by a CSV file with the columns key and right.

    Raises:
        ValueError: the file cannot be read, or lacks a column.
    """
    try:
        options = pacsv.ConvertOptions(
            column_types={"key": pa.string(), "right": pa.bool_()}, include_columns=["key", "right"]
        )
        table = pacsv.read_csv(path, convert_options=options)
    except (OSError, KeyError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"judged must be a CSV file with the columns key and right (true or false), got {path}: {reason}"
        ) from error
    judged = dict(zip(table["key"].to_pylist(), table["right"].to_pylist(), strict=True))
    return lambda row: judged.get(row["key"])
