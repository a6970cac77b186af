"""When the actors that commit shards are started."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
import ray

from pipeline.run.committers import Committers


def test_committers_take_no_process_before_the_stages_have_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray starts two processes at a time on two cores, and the model was loaded a second later."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: pytest.fail("an actor is about to be started"))
    ledger: Any = None
    committers = Committers(ledger, {}, pa.schema([]), coordinator=None)
    committers.close()
