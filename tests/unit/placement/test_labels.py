"""Selectors with operators used to be read as names of labels: no node of a cluster seemed to match."""

from __future__ import annotations

import pytest
from ray._private.label_utils import validate_label_selector_value

from pipeline.placement.cluster import has_labels


@pytest.mark.parametrize(
    ("selector", "chosen"),
    [
        ("cpu", {"cpu"}),
        ("!cpu", {"gpu", "npu", None}),
        ("in(cpu, gpu)", {"cpu", "gpu"}),
        ("in(cpu)", {"cpu"}),
        ("!in(cpu,gpu)", {"npu", None}),
    ],
)
def test_a_selector_chooses_the_nodes_that_ray_chooses(selector: str, chosen: set[str | None]) -> None:
    assert validate_label_selector_value(selector) is None, "Ray knows the form"
    for value in ("cpu", "gpu", "npu", None):
        labels = {"zone": "a"} | ({} if value is None else {"pool": value})
        assert has_labels(labels, {"pool": selector}) == (value in chosen), value


def test_every_selector_must_hold() -> None:
    labels = {"pool": "cpu", "zone": "a"}
    assert has_labels(labels, {}) and has_labels(labels, {"pool": "!gpu", "zone": "a"})
    assert not has_labels(labels, {"pool": "!gpu", "zone": "b"})
