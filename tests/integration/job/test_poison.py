"""An image that kills its process costs its own row only, not the job or the rows next to it."""

import io

import pytest

from blip2_actor.testing import FakeEngineConfig
from pipeline.progress import Console
from pipeline.run.prepare import prepare
from pipeline.run.run_job import run_job
from pipeline.settings.job_settings import CaptionSettings
from tests.integration.inputs import read_output, right_caption, write_tars

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.mark.parametrize("how", ["kills_on", pytest.param("faults_on", marks=pytest.mark.slow)])
def test_the_row_that_kills_gets_a_status_and_the_others_their_captions(tmp_path, how):
    truth = write_tars(tmp_path / "in", num_tars=3, rows_per_tar=50)
    poison = right_caption(truth["part0/00000.tar"]["image-000017"])
    settings = CaptionSettings(
        input=(str(tmp_path / "in"),), output=str(tmp_path / "out"), max_failed_fraction=0.01
    )
    poisons = {how: (poison,)}
    engine = FakeEngineConfig(
        kills_on=poisons.get("kills_on", ()), faults_on=poisons.get("faults_on", ()), max_batch=8
    )
    result = run_job(prepare(settings, engine), Console(io.StringIO()))
    assert dict(result.by_status) == {"ok": 149, "failed": 1}
    assert result.exit_status(0.01) == 0
    for shard, images in truth.items():
        for row, (key, image) in zip(read_output(tmp_path / "out", shard), images.items(), strict=True):
            if key == "image-000017":
                assert (row["status"], row["caption"]) == ("failed", None)
                assert "on this image alone" in row["error"]
            else:
                assert (row["key"], row["caption"]) == (key, right_caption(image))
