"""The id of a run: one name in its record, lease, files, metrics and logs, even for older runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from pipeline.ledger.layout import RUN_FILE
from pipeline.ledger.lease import Lease, read_holder
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.run_record import Run
from pipeline.run.prepare import prepare
from pipeline.schema import RUN_ID_KEY
from pipeline.settings.job_settings import CaptionSettings
from pipeline.storage.folder import Folder
from tests.integration.inputs import write_tars

STORED = Path(__file__).parents[2] / "fixtures/stored_run"


def test_a_new_run_has_an_id_of_its_own_that_its_files_and_its_lease_carry(tmp_path: Path) -> None:
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=1)
    jobs = []
    for name in ("a", "b"):
        settings = CaptionSettings(input=(str(tmp_path / "in"),), output=str(tmp_path / name))
        jobs.append(
            prepare(dataclasses.replace(settings, engine=dataclasses.replace(settings.engine, model="demo")))
        )
    first, second = (job.run.id for job in jobs)
    assert first and second and first != second
    job = jobs[0]
    job.ledger.begin(job.run)
    assert job.ledger.require_run().id == first == job.metadata[RUN_ID_KEY].decode()
    with Lease(job.ledger.folder, run=first):
        holder = read_holder(job.ledger.folder)
        assert holder is not None and holder.run == first


def test_a_run_of_an_older_version_has_the_same_id_at_every_start_and_keeps_it(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    ledger = Ledger(folder)
    ledger.begin(dataclasses.replace(_stored(), id=""))
    stored = json.loads(folder.get(RUN_FILE) or b"")
    del stored["id"]
    folder.put(RUN_FILE, json.dumps(stored).encode())
    run = ledger.require_run()
    assert run.id and ledger.require_run().id == run.id
    ledger.revise(run.with_shards(run.shards, ["/another"]), ())
    assert "id" in json.loads(folder.get(RUN_FILE) or b"") and ledger.require_run().id == run.id


def _stored() -> Run:
    found = next(STORED.rglob("run.json"))
    return Ledger(Folder(str(found.parents[1]))).require_run()
