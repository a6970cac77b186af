"""The command `blip2 compare`: join two outputs, then print a summary and write a page or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from pipeline.compare.as_page import comparison_page
from pipeline.compare.comparison import Comparison, compare
from pipeline.compare.join import Join
from pipeline.compare.metrics import Score
from pipeline.compare.plain_rows import PlainRows, Rows, find_rows
from pipeline.exit_status import ExitStatus, before_work, errors_to_exit_status
from pipeline.ledger.ledger import Ledger
from pipeline.progress import Console, count, write_json
from pipeline.report.rows import FinishedRows, one_line, plain_value
from pipeline.result_file import result_file
from pipeline.settings.report_settings import CompareSettings


@errors_to_exit_status
def command(settings: CompareSettings) -> int:
    """Compare two outputs; the exit status says nothing of what has changed."""
    with before_work(type(settings)):
        html = result_file("html", settings.html) if settings.html is not None else None
        before, after = find_rows(settings.before), find_rows(settings.after)
        _check(before, after, settings.reference)
        num_rows = max(_num_rows(before), _num_rows(after))
    console = Console(sys.stderr if settings.json else sys.stdout)
    for name, side in zip("AB", (before, after), strict=True):
        if isinstance(side, FinishedRows) and side.unfinished:
            console.warn(f"{name}: {side.unfinished}; rows of finished shards are compared")
    others = [] if settings.reference is None else [settings.reference]
    join = Join(before, after, num_rows, others)
    comparison = compare(join, settings.reference)
    comparison.unmatched = dict(join.unmatched)
    scores = comparison.scores()
    if settings.json:
        write_json(json.dumps(_to_dict(comparison, scores), indent=1))
    else:
        for line in summary_lines(comparison, scores):
            console.result(line)
    if html:
        page, num_pictures = comparison_page(before, after, comparison, scores, settings.thumbnails)
        html.write_text(page, encoding="utf-8", errors="backslashreplace")
        console.say(f"page: {settings.html}, with {count(num_pictures, 'thumbnail')} read from the input")
    return ExitStatus.DONE


def summary_lines(comparison: Comparison, scores: dict[str, Score]) -> Iterator[str]:
    """Yield the lines for the terminal."""
    matched = count(comparison.num_pairs, "row")
    yield f"{matched} matched by key and image; unmatched: {_unmatched(comparison)}"
    if comparison.unmatched and not comparison.num_pairs:
        yield "no row has a partner: give two runs over the same images, with the same keys"
    yield (
        f"{comparison.num_changed:,} of {comparison.num_captioned:,} captions changed "
        f"({comparison.changed_fraction:.2%}), {comparison.mean_distance:.2f} words per caption on average"
    )
    if comparison.mean_logprob_change is not None:
        yield f"log-probability: {comparison.mean_logprob_change:+.3f} on average"
    for before, after, number in comparison.status_changes:
        yield f"{count(number, 'row')}: {before} -> {after}"
    for name, score in scores.items():
        yield (
            f"{name}: {score.before:.4f} -> {score.after:.4f}, {score.change:+.4f} "
            f"(95 % interval {score.low:+.4f} to {score.high:+.4f}, {count(comparison.num_scored, 'row')})"
        )
    if comparison.reference and not scores:
        yield f"no captioned pair has a text in {comparison.reference}"
    for change in comparison.largest()[:3]:
        texts = (one_line(row["caption"] or row["status"]) for row in (change.pair.before, change.pair.after))
        yield f"  {one_line(change.pair.before['key'])}: " + " -> ".join(texts)


def _unmatched(comparison: Comparison) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in sorted(comparison.unmatched.items())) or "none"


def _check(before: Rows, after: Rows, reference: str | None) -> None:
    names = [side.schema().names for side in (before, after)]
    for side, columns in zip((before, after), names, strict=True):
        if "caption" not in columns:
            raise ValueError(f"both runs must have captions, got {side.folder} without; compare other runs")
    if reference is not None and not any(reference in columns for columns in names):
        raise ValueError(
            f"reference must be a column of one of the runs, got {reference}; name a column that was kept "
            "with --keep"
        )


def _num_rows(rows: Rows) -> int:
    if isinstance(rows, PlainRows):
        return rows.num_rows
    ledger = Ledger(rows.folder)
    return ledger.reconcile(rows.run, ledger.of(rows.run).scan()).num_rows


def _to_dict(comparison: Comparison, scores: dict[str, Score]) -> dict[str, object]:
    return {
        "matched": comparison.num_pairs,
        "unmatched": dict(comparison.unmatched),
        "captioned": comparison.num_captioned,
        "changed": comparison.num_changed,
        "changed_fraction": comparison.changed_fraction,
        "mean_edit_distance_words": comparison.mean_distance,
        "edit_distances": sorted(comparison.distances.items()),
        "mean_logprob_change": comparison.mean_logprob_change,
        "status_changes": comparison.status_changes,
        "scored": comparison.num_scored,
        "scores": {
            name: {"before": s.before, "after": s.after, "change": s.change, "interval": [s.low, s.high]}
            for name, s in scores.items()
        },
        "largest_changes": [
            plain_value({"distance": c.distance, "before": c.pair.before, "after": c.pair.after})
            for c in comparison.largest()
        ],
    }
