"""What cannot work is refused before Ray starts, with a sentence that says what to do, and status 1."""

import os
import subprocess
import sys

import pytest
import ray

from blip2_actor.testing.fake_engine import FakeEngineConfig
from pipeline.cli.commands import caption, retry, status
from pipeline.settings.job_settings import CaptionSettings
from pipeline.settings.outputs import Outputs
from pipeline.settings.report_settings import StatusSettings
from pipeline.settings.retry_settings import RetrySettings
from tests.integration.inputs import png, write_tar


@pytest.fixture
def refused(tmp_path, capsys):
    """Run the caption command, which must be refused, and give what it said."""

    def run(engine=None, **changes) -> str:
        write_tar(tmp_path / "in" / "a.tar", {"x": png(0)})
        values = {"input": (str(tmp_path / "in"),), "output": str(tmp_path / "out")} | changes
        assert caption(CaptionSettings(**values), engine or FakeEngineConfig()) == 1
        assert not ray.is_initialized()
        said = capsys.readouterr().err
        assert said.startswith("blip2: ")
        assert "Traceback" not in said
        return said

    return run


def test_unknown_model(refused):
    assert "name a folder or use demo" in refused(FakeEngineConfig(model="unknown"))


def test_unknown_model_folder(tmp_path, capsys):
    """Through the real engine's own check."""
    write_tar(tmp_path / "in" / "a.tar", {"x": png(0)})
    from blip2_actor import EngineConfig

    settings = CaptionSettings(
        input=(str(tmp_path / "in"),),
        output=str(tmp_path / "out"),
        engine=EngineConfig(model=str(tmp_path / "no-such-checkpoint")),
    )
    assert caption(settings) == 1
    assert "no-such-checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_prompt_that_no_row_could_be_served_with(refused):
    """Each row would be refused by itself, after the cluster has started for it."""
    assert "prompt must be servable" in refused(prompt="unservable")
    assert "prompt must be servable" in refused(outputs=Outputs(ask=("what=unservable",)))


def test_missing_input(refused, tmp_path):
    assert "nowhere" in refused(input=(str(tmp_path / "nowhere"),))


def test_empty_input(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(input=(str(tmp_path / "empty"),))


def test_pattern_without_a_match(refused, tmp_path):
    assert "*.tor" in refused(input=(str(tmp_path / "in" / "*.tor"),))


def test_output_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("in the way")
    said = refused(output=str(tmp_path / "file" / "out"))
    assert "output must be a folder that can be written" in said


def test_output_with_files_of_someone_else(refused, tmp_path):
    """A file of the same name would be taken for a finished shard, and its rows never be captioned."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.tar.parquet").write_bytes(b"PAR1")
    assert "a.tar.parquet" in refused()


def test_status_and_retry_without_a_run(tmp_path, capsys):
    assert status(StatusSettings(output=str(tmp_path))) == 1
    assert retry(RetrySettings(output=str(tmp_path)), FakeEngineConfig()) == 1
    assert capsys.readouterr().err.count("holds no run; pass the folder given as --output") == 2


def test_serve_becomes_the_deployment_with_its_own_flags():
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "serve", "--help"],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
    )
    assert done.returncode == 0
    assert "--port" in done.stdout
