"""What ends the loop of a driver."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import OutputInUse
from pipeline.run.driver import Driver


def test_a_driver_whose_lease_was_taken_stops_at_once_and_writes_nothing(monkeypatch):
    """Another driver works on the output, and commits what it finds there."""
    driver: Any = Driver.__new__(Driver)
    driver._lease, driver._ledger = SimpleNamespace(lost=True), "/out"
    monkeypatch.setattr(driver, "_flush", pytest.fail)
    with pytest.raises(OutputInUse, match="another driver has taken the lease of /out"):
        driver._stop_if_needed(None)
