"""The dataset card: the README of a data set on the hub, with what its readers must know of the captions."""

from __future__ import annotations

from collections.abc import Iterator

from huggingface_hub import DatasetCard, DatasetCardData

from pipeline.progress import count
from pipeline.report.model import Report
from pipeline.report.models import license_of
from pipeline.report.pace import attempt_lines

MAX_SHOWN = 10
ENTITIES = {ord(character): f"&#{ord(character)};" for character in "&\\`*_[]<>|#~"}


def dataset_card(report: Report) -> str:
    """Return a card in Markdown with the metadata that the hub reads.

    The license is left open: it depends on the images and on the checkpoint, and only the publisher knows it.
    """
    rows = report.statistics.num_rows
    data = DatasetCardData(
        language="en",
        task_categories=["image-to-text"],
        tags=["image-captioning", "blip-2", "machine-generated"],
        size_categories=[_size(rows)],
        pretty_name="Captions by BLIP-2",
        configs=[{"config_name": "default", "data_files": "**/*.parquet"}],
    )
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(_body(report)) + "\n"))


def _body(report: Report) -> Iterator[str]:
    done = report.reconciliation
    yield "# Captions by BLIP-2\n"
    yield f"{count(done.num_rows, 'row')}, of which {done.num_ok:,} are ok and {done.num_failed:,} failed.\n"
    for warning in report.warnings:
        yield f"> {_plain(warning)}\n"
    yield "## How they were made\n"
    yield "| what | value |\n|---|---|"
    for model in report.models:
        yield f"| model | {_plain(model)}: {_plain(license_of(model))} |"
    if report.run.settings.get("prompt"):
        yield f"| prompt | {_plain(report.run.settings['prompt'])} |"
    for line in attempt_lines(report.attempts)[:1]:
        yield f"| speed | {_plain(line.removeprefix('speed: '))} |"
    yield "\n## Rows by status\n"
    yield "| status | rows |\n|---|---|"
    for status, number in report.statistics.by_status.most_common():
        yield f"| {_plain(status)} | {number:,} |"
    top = report.statistics.captions.top(MAX_SHOWN)
    if top:
        yield "\n## Most frequent captions\n"
        yield "| caption | rows |\n|---|---|"
        yield from (f"| {_plain(text)} | {number:,} |" for text, number in top)
    yield "\n## Limits\n"
    yield "A model wrote these captions. They may be wrong, name things that are not in the image, and"
    yield "repeat the biases of the model's training data. The published checkpoints write English."


def _plain(text: str) -> str:
    """Return a text that stays in one cell of a table, and that Markdown and HTML leave as it is."""
    return " ".join(text.split())[:300].translate(ENTITIES)


def _size(rows: int) -> str:
    """Return the size category of the hub."""
    bounds = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
    more = ((10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"))
    return next((name for bound, name in (*bounds, *more) if rows < bound), "n>1B")
