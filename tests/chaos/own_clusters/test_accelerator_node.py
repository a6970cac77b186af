"""A cluster whose driver has no accelerator: actors use those of the workers, and "auto" means their dtype.

The accelerator exists only as a resource of Ray, because the engine is a fake.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.ledger.ledger import Ledger
from pipeline.storage.folder import Folder
from tests.chaos.cluster import cluster, start_driver
from tests.integration.inputs import check_output, write_tars


@pytest.mark.timeout(300)
def test_captions_are_made_where_the_accelerator_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    truth = write_tars(tmp_path / "in", num_tars=2, rows_per_tar=30)
    output, log = tmp_path / "out", tmp_path / "log"
    settings = {"input": [str(tmp_path / "in")], "output": str(output)}
    with cluster(num_nodes=1, num_gpus=1) as nodes:
        driver = start_driver(nodes, settings, {"dtype": "auto"}, log)
        assert driver.wait() == 0, log.read_text()
    check_output(output, truth)
    run = Ledger(Folder(str(output))).require_run()
    assert run.fingerprint.parts["dtype"] == "bfloat16"
