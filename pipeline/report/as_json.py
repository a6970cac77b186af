"""The report as one JSON object: the same figures as the page, for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline.report.model import Report
from pipeline.report.rows import plain_value
from pipeline.report.statistics import CountWithExamples, FrequentTexts

MAX_TEXTS = 100


def report_json(report: Report) -> str:
    """Return the report as indented JSON; NaN and infinity become null, bytes hexadecimal digits."""
    done, statistics, attempts = report.reconciliation, report.statistics, report.attempts
    values: dict[str, Any] = {
        "output": report.output,
        "models": report.models,
        "prompt": report.run.settings.get("prompt"),
        "warnings": report.warnings,
        "rows": done.num_rows,
        "by_status": statistics.by_status,
        "failed_fraction": done.failed_fraction,
        "shards": done.num_shards,
        "shards_written": len(done.summaries),
        "partial": {summary.shard: summary.reason for summary in done.partial},
        "unread": report.run.unread.lines(),
        "rows_per_s": attempts.rows_per_s,
        "active_s": attempts.active_s if attempts.all else None,
        "busy_fractions": attempts.busy_fractions,
        "attempts": [attempt.to_dict() for attempt in attempts],
        "failures": [
            {"status": status, "error": error, **_counted(rows)}
            for (status, error), rows in statistics.most_frequent_reasons()
        ],
        "flags": {flag: _counted(rows) for flag, rows in statistics.flags.items()},
        "captions": _texts(statistics.captions),
        "openings": _texts(statistics.openings),
        "answers": {name: _texts(texts) for name, texts in statistics.answers.items()},
        "histograms": {
            "num_tokens": _pairs(statistics.num_tokens),
            "logprob": _pairs(statistics.logprobs),
            "long_side_px": _pairs(statistics.long_side_px),
            "scores": {name: _pairs(counts) for name, counts in statistics.scores.items()},
            "vector_norms": {name: _pairs(counts) for name, counts in report.norms.items()},
        },
        "samples": [{"groups": sample.groups, "row": sample.row} for sample in report.samples],
    }
    return json.dumps(plain_value(values), ensure_ascii=False, allow_nan=False, indent=1)


def _counted(rows: CountWithExamples) -> dict[str, Any]:
    return {"rows": rows.count, "examples": rows.examples}


def _texts(texts: FrequentTexts) -> dict[str, Any]:
    top = [{"text": text, "rows": number} for text, number in texts.top(MAX_TEXTS)]
    return {"top": top, "is_exact": texts.is_exact}


def _pairs(counts: Mapping[Any, int]) -> list[tuple[Any, int]]:
    return sorted(counts.items())
