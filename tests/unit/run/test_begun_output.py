"""An output with a run must still be writable: a driver whose heartbeats fail looks dead."""

from __future__ import annotations

from pathlib import Path

import pytest

from blip2_actor.testing import FakeEngineConfig
from pipeline.run.prepare import prepare_retry
from pipeline.settings.retry_settings import RetrySettings
from pipeline.storage.folder import Folder
from tests.unit.inputs.run_without_ray import prepare_run, work
from tests.unit.inputs.test_changes import write_tar


@pytest.mark.parametrize("scheme", ["local://", ""])
def test_a_filesystem_that_moves_files_is_tested_also_for_a_run_that_has_begun(tmp_path, monkeypatch, scheme):
    """Only a new run used to be refused on a file system that cannot replace files."""
    write_tar(Path(tmp_path) / "in/a.tar", "a0")
    output = f"{scheme}{tmp_path}/out"
    work(prepare_run(tmp_path, output=output))
    tested: list[str] = []
    monkeypatch.setattr(Folder, "require_writable", lambda folder: tested.append(str(folder)))
    for part in (None, "1/2"):
        assert not prepare_run(tmp_path, output=output, slice=part).is_new
    prepare_retry(RetrySettings(output=output), FakeEngineConfig())
    assert len(tested) == (3 if scheme else 0)
