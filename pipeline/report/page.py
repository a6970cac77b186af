"""The report as one HTML page: the contact sheet first, then figures, failures and what ran."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from blip2_actor import Status
from pipeline.attempts.attempt import STAGES, Attempt, Attempts
from pipeline.page.figures import Histogram, Line, histogram, line
from pipeline.page.render import MAX_TEXT_CHARS, data_uri, render
from pipeline.page.sheet import Card, Sheet, Text, used
from pipeline.progress import cut, duration
from pipeline.report.model import Report, Sample
from pipeline.report.models import license_of
from pipeline.report.pace import attempt_lines, last_s, time_of, verdict
from pipeline.report.remedies import remedy
from pipeline.report.rows import is_own_column, short_value
from pipeline.report.samples import GROUPS
from pipeline.report.statistics import LOGPROB_DIGITS, SCORE_DIGITS, binned, size_class

MAX_REASONS = 50
MAX_TEXTS = 20
MAX_ATTEMPTS = 20
ORDERS = {"logprob": "log-probability", "tokens": "tokens", "side": "image size"}


def render_page(report: Report) -> str:
    """Render the whole page."""
    return render("report.html", **_values(report))


def _values(report: Report) -> dict[str, Any]:
    statistics, attempts = report.statistics, report.attempts
    partial = report.reconciliation.lines(is_over=False)
    return {
        "title": f"{report.output}: BLIP-2 report",
        "output": report.output,
        "models": [(model, license_of(model)) for model in report.models],
        "prompt": report.run.settings.get("prompt"),
        "warnings": report.warnings,
        "notes": [
            *(note for note in partial if note.startswith(("partial:", "note:"))),
            *report.run.unread.lines(),
        ],
        "facts": _facts(report),
        "sheet": _sheet(report),
        "lacks_pictures": report.max_thumbnails > 0 and not report.thumbnails,
        "histograms": list(_histograms(report)),
        "statuses": statistics.by_status.most_common(),
        "failures": _failures(report),
        "more_reasons": max(0, len(statistics.reasons) - MAX_REASONS),
        "retry": f"blip2 retry --output {shlex.quote(report.output)}",
        "flags": [(f, n.count, ", ".join(n.examples)) for f, n in sorted(statistics.flags.items())],
        "texts": list(_texts(report)),
        "speed": attempt_lines(attempts)[0],
        "verdict": verdict(attempts),
        "throughput": throughput(attempts),
        "stages": _stages(attempts),
        "attempts": [_attempt_row(attempt) for attempt in attempts.all[-MAX_ATTEMPTS:]],
        "last": attempts.last_ready,
        "hardware": _hardware(attempts.last_ready),
        "worker_warnings": attempts.warnings.most_common(),
    }


def _facts(report: Report) -> list[tuple[str, str, bool]]:
    done, rate = report.reconciliation, report.attempts.rows_per_s
    return [
        ("rows", f"{done.num_rows:,}", False),
        ("ok", f"{done.num_ok:,}", False),
        ("failed", f"{done.num_failed:,}", done.num_failed > 0),
        ("failed share", f"{done.failed_fraction:.2%}", done.num_failed > 0),
        ("shards written", f"{len(done.summaries):,} of {done.num_shards:,}", bool(done.missing)),
        ("rows/s while working", "unknown" if rate is None else f"{rate:,.1f}", False),
    ]


# The contact sheet ------------------------------------------------------------------------------------


def _sheet(report: Report) -> Sheet:
    scores = {f"score{index}": name for index, name in enumerate(report.outputs.scores)}
    cards = [_card(report, sample, scores) for sample in report.samples]
    known = {name for card in cards for name in card.values}
    orders = {name: label for name, label in {**ORDERS, **scores}.items() if name in known}
    return Sheet(cards, used(GROUPS, cards), orders)


def _card(report: Report, sample: Sample, scores: Mapping[str, str]) -> Card:
    row, jpeg = sample.row, report.thumbnails.get(sample.address)
    size = "" if row["width"] is None else f", {row['width']:,} × {row['height']:,}"
    logprob = row.get("logprob")
    likely = "" if logprob is None else f"\nlog-probability {logprob:.3g}"
    return Card(
        key=row["key"],
        texts=list(_card_texts(row)),
        source=f"{row['shard']}{size}{likely}",
        picture=None if jpeg is None else data_uri(jpeg),
        groups=sample.groups,
        values=_card_values(row, scores),
    )


def _card_texts(row: Mapping[str, Any]) -> Iterator[Text]:
    if row["status"] != Status.OK.value:
        yield Text.plain(row["status"], cut(row["error"] or "", MAX_TEXT_CHARS), is_bad=True)
        return
    for text in row.get("captions") or [row.get("caption")]:
        if text is not None:
            yield Text.plain("", cut(text, MAX_TEXT_CHARS))
    for flag in row["flags"]:
        yield Text.plain("flag", flag, is_bad=True)
    for name in filter(is_own_column, row):
        yield Text.plain(name, short_value(row[name]))


def _card_values(row: Mapping[str, Any], scores: Mapping[str, str]) -> dict[str, float]:
    """Return the numbers by which the sheet sorts; those in histograms are rounded like the bars."""
    logprob = row.get("logprob")
    values = {"logprob": logprob, "tokens": row.get("num_tokens"), "likely": _bar(logprob, LOGPROB_DIGITS)}
    if row["width"] is not None:
        values["side"] = int(size_class(np.array(max(row["width"], row["height"]))))
    for field, name in scores.items():
        values[field] = _bar(row.get(name), SCORE_DIGITS)
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def _bar(value: float | None, digits: int) -> float | None:
    """Return a number as the histograms count it; None if they leave it out."""
    return None if value is None or not math.isfinite(value) else float(binned(np.array(value), digits))


# Figures and tables -----------------------------------------------------------------------------------


def _histograms(report: Report) -> Iterator[Histogram]:
    statistics = report.statistics
    figures = [
        histogram("Length of captions in tokens", statistics.num_tokens, "tokens"),
        histogram("Log-probability of captions", statistics.logprobs, "likely"),
        histogram("Longer side of images in pixels, up to", statistics.long_side_px, "side"),
    ]
    for index, (name, counts) in enumerate(statistics.scores.items()):
        figures.append(histogram(f"Score {name}", counts, f"score{index}"))
    for name, norms in report.norms.items():
        figures.append(histogram(f"Norm of {name}, of {sum(norms.values()):,} sampled rows", norms))
    yield from (figure for figure in figures if figure is not None)


def _failures(report: Report) -> list[tuple[str, str, int, str, str]]:
    return [
        (status, error, rows.count, ", ".join(rows.examples), remedy(status, error))
        for (status, error), rows in report.statistics.most_frequent_reasons()[:MAX_REASONS]
    ]


def _texts(report: Report) -> Iterator[tuple[str, str, Sequence[tuple[str, int]]]]:
    """Yield tables of frequent texts: title, name of the column, rows."""
    statistics = report.statistics
    tables = [
        ("Repeated captions", "caption", statistics.captions),
        ("Openings: the first three words", "opening", statistics.openings),
        *((f"Answers: {name}", "answer", texts) for name, texts in statistics.answers.items()),
    ]
    for title, column, texts in tables:
        top = [(cut(text, 300), number) for text, number in texts.top(MAX_TEXTS)]
        if top:
            yield title + ("" if texts.is_exact else ", counts are lower bounds"), column, top


def throughput(attempts: Attempts) -> Line | None:
    """Return rows per second over the working time of all attempts, one after the other."""
    return line([list(_rates(attempt)) for attempt in attempts])


def _rates(attempt: Attempt) -> Iterator[tuple[float, float]]:
    """Yield (seconds it lasts, rows per second) of each piece of an attempt since it was ready."""
    if attempt.ready_s is None:
        return
    seconds, rows = attempt.ready_s, 0
    for point in attempt.points:
        lasts = point.seconds - seconds
        if lasts > 0:
            yield lasts, (point.rows - rows) / lasts
            seconds, rows = point.seconds, point.rows


def _stages(attempts: Attempts) -> list[tuple[str, str, str]]:
    """Return the busy seconds and the busy share of each stage."""
    busy_s, fractions = attempts.busy_s, attempts.busy_fractions
    return [
        (stage, f"{busy_s[stage]:,.1f}", f"{fractions[stage]:.0%}") for stage in STAGES if stage in fractions
    ]


def _hardware(last: Attempt | None) -> list[tuple[str, str]]:
    """Return what an attempt ran on."""
    if last is None:
        return []
    shown = [(name, value) for name, value in last.hardware.items() if value or value == 0]
    texts = [(name, ", ".join(value) if isinstance(value, list) else f"{value}") for name, value in shown]
    return [*((name.replace("_", " "), text) for name, text in texts), ("dtype", last.dtype)]


def _attempt_row(attempt: Attempt) -> tuple[Any, ...]:
    rate = Attempts((attempt,)).rows_per_s
    return (
        time_of(attempt),
        duration(last_s(attempt)),
        attempt.rows,
        "" if rate is None else f"{rate:,.1f}",
        "" if attempt.exit_status is None else str(attempt.exit_status),
        attempt.ending,
    )
