"""What a retry copies from the run, and what its own flags change."""

from __future__ import annotations

import pytest

from pipeline.settings.placement import Placement
from pipeline.settings.retry_settings import PlacementChanges
from tests.unit.inputs.formats.reading_cases import tar_bytes
from tests.unit.inputs.run_without_ray import prepare_of_retry, run


def test_a_retry_keeps_the_flags_of_the_run_unless_it_has_others(tmp_path):
    """A retry of a run with 10 % of bad images used to exit with 2, and to run with one actor."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.tar").write_bytes(tar_bytes([("a.jpg", b"good"), ("b.jpg", b"bad")]))
    run(tmp_path, max_failed_fraction=0.5, placement=Placement(max_actors=3, gpus_per_actor=0.5))
    kept = prepare_of_retry(tmp_path).settings
    assert (kept.max_failed_fraction, kept.placement) == (0.5, Placement(max_actors=3, gpus_per_actor=0.5))
    other = prepare_of_retry(tmp_path, max_failed_fraction=0.0, placement=PlacementChanges(max_actors=1))
    assert other.settings.max_failed_fraction == 0.0
    assert other.settings.placement == Placement(max_actors=1, gpus_per_actor=0.5)
    with pytest.raises(ValueError, match="max_actors must be at least 1, got 0"):
        PlacementChanges(max_actors=0)
