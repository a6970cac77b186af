"""The report as one self-contained HTML page: no scripts, no fonts, thumbnails inside the page.

Captions, keys and errors come from untrusted data. Every text is escaped, and the page's
Content-Security-Policy forbids it to load or run anything.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from blip2_actor import Status
from pipeline.report.model import Report
from pipeline.report.pace import attempt_lines
from pipeline.report.rows import is_own_column, short_value
from pipeline.settings.from_dict import from_dict
from pipeline.settings.outputs import Outputs

MAX_REASONS = 20
MAX_CAPTIONS = 20
STYLE = """
:root { color-scheme: light; --ink: #1d2433; --soft: #5a6475; --line: #dfe3ea; --bar: #3467b8;
  --bad: #b3261e; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; margin: 0; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p { margin: .25rem 0; } .soft { color: var(--soft); }
dl { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.5rem 0; padding: 0; }
dl div { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem 1rem; min-width: 7rem; }
dt { color: var(--soft); font-size: .9rem; } dd { margin: 0; font-size: 1.4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
caption { text-align: left; color: var(--soft); padding-bottom: .25rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0; font-weight: normal;
  border-bottom: 1px solid var(--line); overflow-wrap: break-word; }
thead th { color: var(--soft); font-size: .9rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; width: 6rem; }
.share { width: 30%; min-width: 6rem; }
.bar { display: block; height: .8rem; margin-top: .35rem; background: var(--bar); border-radius: .2rem;
  min-width: 1px; }
ul.samples { list-style: none; padding: 0; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); }
ul.samples li { border: 1px solid var(--line); border-radius: .5rem; padding: .75rem;
  overflow-wrap: anywhere; }
ul.samples img { display: block; margin: 0 auto .5rem; max-width: 100%; height: auto; }
.key { font-size: .85rem; color: var(--soft); } .bad { color: var(--bad); }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render_page(report: Report) -> str:
    """Render the whole page."""
    body = "\n".join(_sections(report))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.output)}: BLIP-2 report</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _sections(report: Report) -> Iterator[str]:
    statistics = report.statistics
    yield from _head(report)
    yield _bar_chart("Rows by status", "status", statistics.by_status.most_common())
    yield from _failures(report)
    if statistics.flags:
        yield _table(
            "Flagged captions",
            "Captions that the quality checks flagged",
            ("flag", "rows", "examples"),
            [(flag, rows.count, ", ".join(rows.examples)) for flag, rows in sorted(statistics.flags.items())],
        )
    if statistics.num_tokens:
        yield _bar_chart("Length of captions", "tokens", sorted(statistics.num_tokens.items()))
    repeated = statistics.captions.top(MAX_CAPTIONS)
    if repeated:
        bound = "" if statistics.captions.is_exact else "; the counts are lower bounds"
        yield _bar_chart(f"Most frequent captions{bound}", "caption", repeated)
    if statistics.long_side_px:
        sizes = [(f"up to {side:,}", count) for side, count in sorted(statistics.long_side_px.items())]
        yield _bar_chart("Size of images", "longer side, pixels", sizes)
    yield from _samples(report)


def _head(report: Report) -> Iterator[str]:
    done, settings = report.reconciliation, report.run.settings
    prompt = settings.get("prompt")
    yield f"<h1>{escape(report.output)}</h1>"
    yield f"<p>{escape(_models(settings))}" + (f", prompt “{escape(prompt)}”</p>" if prompt else "</p>")
    yield f'<p class="soft">{escape(" · ".join(attempt_lines(report.attempts)))}</p>'
    facts = (
        ("rows", f"{done.num_rows:,}"),
        ("ok", f"{done.num_ok:,}"),
        ("failed", f"{done.num_failed:,}"),
        ("failed share", f"{done.failed_fraction:.2%}"),
        ("shards written", f"{len(done.summaries):,} of {done.num_shards:,}"),
    )
    yield "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts) + "</dl>"
    partial = [line for line in done.lines(is_over=False) if line.startswith(("partial:", "..."))]
    if partial:
        yield "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in partial) + "</ul>"


def _models(settings: Mapping[str, Any]) -> str:
    """Name the models that the run loaded."""
    outputs, model = from_dict(Outputs, settings["outputs"]), str(settings["engine"]["model"])
    if outputs.score_model is None:
        return model
    return outputs.score_model if outputs.only_matches else f"{model}, scores by {outputs.score_model}"


def _failures(report: Report) -> Iterator[str]:
    reasons = report.statistics.most_frequent_reasons()
    if not reasons:
        return
    shown = [
        (status, reason, rows.count, ", ".join(rows.examples))
        for (status, reason), rows in reasons[:MAX_REASONS]
    ]
    more = len(reasons) - MAX_REASONS
    summary = "N stands for any number in an error" + (f"; {more:,} more reasons" if more > 0 else "")
    yield _table("Why rows failed", summary, ("status", "error", "rows", "examples"), shown)


def _samples(report: Report) -> Iterator[str]:
    yield f"<h2>{len(report.samples)} rows from all over the output</h2>"
    yield '<ul class="samples">' + "\n".join(_sample(report, row) for row in report.samples) + "</ul>"


def _sample(report: Report, row: dict[str, Any]) -> str:
    parts = []
    thumbnail = report.thumbnails.get((row["shard"], row["row"]))
    if thumbnail is not None:
        content = base64.b64encode(thumbnail).decode()
        parts.append(f'<img src="data:image/jpeg;base64,{content}" alt="The image of the row below">')
    if row["status"] == Status.OK.value:
        texts = row.get("captions") or [row.get("caption") or ""]
        parts += [f"<p>{escape(text)}</p>" for text in texts]
    else:
        parts.append(f'<p class="bad">{escape(row["status"])}: {escape(row["error"] or "")}</p>')
    parts += [f'<p class="bad">{escape(flag)}</p>' for flag in row["flags"]]
    parts += [
        f"<p>{escape(name)}: {escape(short_value(row[name]))}</p>" for name in row if is_own_column(name)
    ]
    size = "" if row["width"] is None else f", {row['width']:,} × {row['height']:,}"
    parts.append(f'<p class="key">{escape(row["key"])}<br>{escape(row["shard"])}{size}</p>')
    return f"<li>{''.join(parts)}</li>"


def _bar_chart(title: str, column: str, counts: Sequence[tuple[object, int]]) -> str:
    """Render a table with a bar for each count; the largest count has the longest bar."""
    largest = max((count for _, count in counts), default=1)
    rows = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td class="number">{count:,}</td>'
        f'<td class="share"><span class="bar" style="width:{100 * count / largest:.1f}%"></span></td></tr>'
        for name, count in counts
    )
    head = f'<th scope="col">{escape(column)}</th><th scope="col" class="number">rows</th><td></td>'
    return f"<h2>{escape(title)}</h2>\n<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _table(title: str, summary: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f'<th scope="col"{_cell_class(name)}>{escape(name)}</th>' for name in columns)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{_cell_class(name)}>{f'{cell:,}' if isinstance(cell, int) else escape(str(cell))}</td>"
            for name, cell in zip(columns, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<h2>{escape(title)}</h2>\n<div class="scroll"><table><caption>{escape(summary)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell_class(column: str) -> str:
    return ' class="number"' if column == "rows" else ""
