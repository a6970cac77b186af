"""The confidence of captions on scenes of known truth, degraded by noise, blur and occlusion."""

from __future__ import annotations

import pytest

from benchmarks.confidence import KINDS, measure


@pytest.mark.slow
def test_the_confidence_is_calibrated_and_tells_right_from_wrong() -> None:
    found = measure(num_scenes=3000, threads=1)
    assert 0.4 < found["accuracy"] < 0.8
    assert found["calibration_error_10_bins"] < 0.05 and found["calibration_error_15_bins"] < 0.05
    assert found["auroc"] >= 0.80
    for kind in KINDS:
        assert found["by_kind"][kind]["auroc"] >= 0.75, kind
    kept = found["abstention"]["0.9"]
    assert kept["kept"] > 0.1 and kept["accuracy"] > 0.85
