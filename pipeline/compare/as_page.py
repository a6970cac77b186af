"""The comparison as one HTML page: a sheet of the largest changes with a word diff, and figures."""

from __future__ import annotations

from collections.abc import Iterator

from blip2_actor import Status
from pipeline.compare.comparison import LOGPROB_DIGITS, Change, Comparison
from pipeline.compare.edit_distance import diff
from pipeline.compare.metrics import Score
from pipeline.compare.plain_rows import Rows
from pipeline.page.figures import histogram
from pipeline.page.render import MAX_TEXT_CHARS, data_uri, render
from pipeline.page.sheet import Card, Piece, Sheet, Text, used
from pipeline.page.thumbnails import RowAddress, thumbnails_of_run
from pipeline.progress import cut
from pipeline.report.rows import FinishedRows

GROUPS = {"captions": "largest changes of captions", "statuses": "changed statuses"}
ORDERS = {"distance": "edit distance", "change": "change of log-probability"}


def comparison_page(
    before: Rows,
    after: Rows,
    comparison: Comparison,
    scores: dict[str, Score],
    num_thumbnails: int,
) -> tuple[str, int]:
    """Render the page; return it with its number of pictures.

    Args:
        num_thumbnails: maximum number of pictures; 0 leaves the input alone.
    """
    changes = comparison.largest()
    rows = [change.pair.before for change in changes]
    pictures = {}
    if isinstance(before, FinishedRows):  # the images of others are not known
        pictures = thumbnails_of_run(before.run, rows, num_thumbnails)
    cards = [_card(change, pictures) for change in changes]
    figures = (
        histogram("Edit distance of captions in words", comparison.distances, "distance"),
        histogram("Change of the log-probability, B minus A", comparison.logprobs, "changebin"),
    )
    page = render(
        "compare.html",
        title="BLIP-2: two runs compared",
        sides=(("A", str(before.folder)), ("B", str(after.folder))),
        facts=_facts(comparison),
        scores=[
            (name, f"{s.before:.4f}", f"{s.after:.4f}", f"{s.change:+.4f}", f"{s.low:+.4f} to {s.high:+.4f}")
            for name, s in scores.items()
        ],
        num_scored=comparison.num_scored,
        reference=comparison.reference,
        statuses=comparison.status_changes,
        unmatched=sorted(comparison.unmatched.items()),
        sheet=Sheet(cards, used(GROUPS, cards), ORDERS),
        histograms=[figure for figure in figures if figure is not None],
    )
    return page, len(pictures)


def _facts(comparison: Comparison) -> list[tuple[str, str, bool]]:
    change = comparison.mean_logprob_change
    return [
        ("rows matched", f"{comparison.num_pairs:,}", False),
        ("rows unmatched", f"{sum(comparison.unmatched.values()):,}", any(comparison.unmatched.values())),
        ("captions changed", f"{comparison.changed_fraction:.2%}", False),
        ("words changed, mean", f"{comparison.mean_distance:.2f}", False),
        ("log-probability, mean change", "unknown" if change is None else f"{change:+.3f}", False),
        ("statuses changed", f"{sum(n for *_, n in comparison.status_changes):,}", False),
    ]


def _card(change: Change, pictures: dict[RowAddress, bytes]) -> Card:
    before, gain = change.pair.before, change.pair.logprob_change
    jpeg = pictures.get((before["shard"], before["row"]))
    values: dict[str, float] = {"distance": change.distance}
    if gain is not None:
        values |= {"change": gain, "changebin": round(gain, LOGPROB_DIGITS)}
    is_status = before["status"] != change.pair.after["status"]
    return Card(
        key=before["key"],
        texts=list(_texts(change)),
        source=before["shard"],
        picture=None if jpeg is None else data_uri(jpeg),
        groups=("statuses" if is_status else "captions",),
        values=values,
    )


def _texts(change: Change) -> Iterator[Text]:
    before, after = change.pair.before, change.pair.after
    if before["status"] == after["status"] == Status.OK:
        captions = (cut(row["caption"] or "", MAX_TEXT_CHARS).split() for row in (before, after))
        for name, pieces in zip("AB", diff(*captions), strict=True):
            yield Text(name, [Piece(f"{words} ", is_marked) for words, is_marked in pieces])
        if change.pair.logprob_change is not None:
            yield Text.plain("log-probability", f"{before['logprob']:.3f} → {after['logprob']:.3f}")
        return
    for name, row in (("A", before), ("B", after)):
        is_ok = row["status"] == Status.OK
        text = row["caption"] or "" if is_ok else f"{row['status']}: {row['error'] or ''}"
        yield Text.plain(name, cut(text, MAX_TEXT_CHARS), is_bad=not is_ok)
