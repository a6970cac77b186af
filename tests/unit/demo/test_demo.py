"""The summary that `blip2 demo` prints of an output."""

from __future__ import annotations

import io

from blip2_actor import Status
from pipeline.demo.dataset import Expected
from pipeline.demo.demo import _show_captions, compare
from pipeline.progress import Console


def test_a_row_that_is_missing_is_counted_and_not_shown():
    """The demo used to end with a KeyError, without naming the missing row."""
    truth = {key: Expected(status=Status.OK, caption="a dot") for key in ("a", "b")}
    rows = {"a": {"caption": "a dot", "status": "ok"}}
    said = io.StringIO()
    _show_captions(Console(said), rows, truth)
    assert said.getvalue().split() == ["A", "handful", "of", "captions:", "a", "a", "dot"]
    assert compare(rows, truth).wrong_status == ("b",)
