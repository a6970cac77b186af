"""What cannot work is refused before Ray starts: one sentence with a remedy, and exit status 3."""

import errno
import os
import signal
from pathlib import Path

import pytest
import ray

from blip2_actor import EngineConfig, ModelInfo
from blip2_actor.testing import FakeEngineConfig
from pipeline.attempts.refusal import last_refusal
from pipeline.cli.commands import caption, retry
from pipeline.cli.main import main
from pipeline.cli.status import status
from pipeline.errors import OutputInUse, RayStartFailed, Stopped, StoppedBySignal, TooManyFailures
from pipeline.exit_status import REMEDIES, ExitStatus, errors_to_exit_status
from pipeline.inputs.reader import ReadOptions
from pipeline.placement.storage_check import SUBMITTED
from pipeline.run.prepare import prepare
from pipeline.settings.job_settings import CaptionSettings
from pipeline.settings.outputs import Outputs
from pipeline.settings.report_settings import StatusSettings
from pipeline.settings.retry_settings import RetrySettings
from pipeline.storage.folder import Folder
from tests.integration.inputs import png, write_tar


@pytest.fixture
def refused(tmp_path, capsys):
    """Run the caption command, which must be refused, and return its output."""

    def run(engine=None, **changes) -> str:
        write_tar(tmp_path / "in" / "a.tar", {"x": png(0)})
        values = {"input": (str(tmp_path / "in"),), "output": str(tmp_path / "out")} | changes
        assert caption(CaptionSettings(**values), engine or FakeEngineConfig()) == 3
        assert not ray.is_initialized()
        said = capsys.readouterr().err
        assert said.startswith("blip2: ")
        assert "Traceback" not in said
        return said

    return run


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EDQUOT, errno.EROFS])
def test_an_error_of_a_disk_says_what_to_do(number, capsys, monkeypatch):
    """Every command that writes used to end with "[Errno 28] No space left on device" alone."""

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("pipeline.report.status.Ledger", fail)
    assert status(StatusSettings(output="x")) == 3
    assert f"{os.strerror(number)}; {REMEDIES[number]}" in capsys.readouterr().err
    assert errors_to_exit_status(fail)() == 1
    assert f"{os.strerror(number)}; {REMEDIES[number]}" in capsys.readouterr().err


def test_unknown_model(refused):
    assert "name a folder or use demo" in refused(FakeEngineConfig(model="unknown"))


def test_unknown_model_folder(tmp_path, capsys):
    """The real engine checks this."""
    write_tar(tmp_path / "in" / "a.tar", {"x": png(0)})
    settings = CaptionSettings(
        input=(str(tmp_path / "in"),),
        output=str(tmp_path / "out"),
        engine=EngineConfig(model=str(tmp_path / "no-such-checkpoint")),
    )
    assert caption(settings) == 3
    assert "no-such-checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_refused_job_of_a_cluster_says_so_in_its_output_and_claims_nothing(tmp_path, refused, monkeypatch):
    """A RayJob has a cluster for each attempt, and the log of an attempt is lost with it."""
    folder = Folder(str(tmp_path / "out"))
    refused(reading=ReadOptions(image_column="jpg"))
    assert not (tmp_path / "out").exists(), "of a person at a terminal"
    monkeypatch.setenv(SUBMITTED, "{}")
    for _ in range(2):
        refused(reading=ReadOptions(image_column="jpg"))
        assert folder.names() == ["_blip2/refused.json"]
    refusal = last_refusal(folder)
    assert refusal is not None and refusal.reason.startswith("--image-column must be")
    settings = CaptionSettings(input=(str(tmp_path / "in"),), output=folder.uri)
    assert prepare(settings, FakeEngineConfig()).is_new, "another command may begin here"
    refused(output="out")  # in a folder that Ray deletes
    assert not Path("out").exists()


def test_a_refusal_of_a_setting_names_its_flag_and_leaves_paths_alone(tmp_path, refused):
    assert "blip2: --image-column must be" in refused(reading=ReadOptions(image_column="jpg"))
    missing = tmp_path / "num_beams" / "max_slots.tar"
    assert f"no such file or folder: {missing}\n" in refused(input=(str(missing),))


def test_a_prompt_that_the_model_cannot_take(refused):
    """Every row would be refused, but only after a cluster has started for it."""
    assert "prompt must be servable" in refused(prompt="unservable")
    assert "prompt must be servable" in refused(outputs=Outputs(ask=("what=unservable",)))


@pytest.mark.parametrize("command", ["caption", "plan"])
def test_a_missing_input_is_said_before_the_model_is_looked_at(command, tmp_path, capsys, monkeypatch):
    """Importing the model used to take seconds, and without the hub the input was not named."""

    def info(config: EngineConfig) -> ModelInfo:
        raise ValueError("the model was looked at")

    monkeypatch.setattr(EngineConfig, "info", info)
    assert main([command, str(tmp_path / "nowhere"), "-o", str(tmp_path / "out")]) == 3
    assert "no such file or folder: " in capsys.readouterr().err


def test_empty_input(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(input=(str(tmp_path / "empty"),))


def test_pattern_without_a_match(refused, tmp_path):
    assert "*.tor" in refused(input=(str(tmp_path / "in" / "*.tor"),))


def test_output_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("in the way")
    said = refused(output=str(tmp_path / "file" / "out"))
    assert f"must be a folder that can be written, got {tmp_path / 'file' / 'out'}: Not a directory; " in said


def test_output_with_files_that_no_run_has_written(refused, tmp_path):
    """A file of the same name would count as a finished shard, and its rows would never be captioned."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.tar.parquet").write_bytes(b"PAR1")
    assert "a.tar.parquet" in refused()


def test_status_and_retry_without_a_run(tmp_path, capsys):
    assert status(StatusSettings(output=str(tmp_path))) == 3
    assert retry(RetrySettings(output=str(tmp_path)), FakeEngineConfig()) == 3
    assert capsys.readouterr().err.count("holds no run; pass the folder given as --output") == 2


def test_an_output_that_was_begun_with_other_settings(refused, tmp_path):
    settings = CaptionSettings(input=(str(tmp_path / "in"),), output=str(tmp_path / "out"))
    write_tar(tmp_path / "in" / "a.tar", {"x": png(0)})
    job = prepare(settings, FakeEngineConfig())
    job.ledger.begin(job.run)
    assert "'another'" in refused(prompt="another")


@pytest.mark.parametrize(
    "arguments",
    [
        "embed --model demo --input {}/nowhere --output {}/out",
        "score --model demo --input {}/nowhere --output {}/out --text-column txt",
        "embed --model {}/no-model --input {} --output {}/out",
        "plan --model demo --input {}/nowhere",
        "plan embed --model demo --input {}/nowhere",
        "report --output {}",
        "status --output {}",
        "retry --output {}",
        "demo --output {}",
    ],
)
def test_every_command_refuses_before_work(arguments, tmp_path, capsys):
    """Each of them used to exit with 1, which means that the same command may succeed later."""
    (tmp_path / "mine").write_text("a file that no command has written")
    assert main(arguments.format(*[tmp_path] * 3).split()) == 3
    assert not ray.is_initialized()
    said = capsys.readouterr().err
    assert said.startswith("blip2: ") and str(tmp_path) in said and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OSError("the disk is full"), 1),
        (ValueError("a fragment is damaged"), 1),
        (OutputInUse("process 7 works on it"), 1),
        (RayStartFailed("Ray did not start"), 1),
        (Stopped("the job has failed"), 1),
        (StoppedBySignal(signal.SIGINT), 130),
        (StoppedBySignal(signal.SIGTERM), 143),
        (TooManyFailures("most rows failed"), 2),
    ],
)
def test_what_fails_after_work_has_begun_may_be_tried_again(error, status, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise error

    write_tar(tmp_path / "in" / "a.tar", {"x": png(0)})
    monkeypatch.setattr("pipeline.cli.commands.run_job", fail)
    settings = CaptionSettings(input=(str(tmp_path / "in"),), output=str(tmp_path / "out"))
    assert caption(settings, FakeEngineConfig()) == status
    assert capsys.readouterr().err == f"blip2: {error}\n"


def test_no_sentence_holds_the_password_of_a_uri(monkeypatch, capsys):
    def fail(*_):
        raise Stopped("s3://key:secret@bucket/a.tar?session_token=secret cannot be read")

    monkeypatch.setattr("pipeline.cli.commands.prepare", fail)
    assert caption(CaptionSettings(input=("a",), output="b"), FakeEngineConfig()) == 1
    said = capsys.readouterr().err
    assert "bucket/a.tar" in said and "secret" not in said


@pytest.mark.parametrize("words", ["-o a s3://me:secret@b/k?key=secret", "a --limit s3://me:secret@b/k"])
def test_no_usage_error_holds_the_password_of_a_uri(words, capsys):
    with pytest.raises(SystemExit, match="3"):
        main(["show", *words.split()])
    said = capsys.readouterr().err
    assert "got" in said and "s3://b/k" in said and "secret" not in said


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def fail(*_):
        raise TypeError("a bug")

    monkeypatch.setattr("pipeline.cli.commands.prepare", fail)
    with pytest.raises(TypeError):
        caption(CaptionSettings(input=("a",), output="b"), FakeEngineConfig())


def test_the_table_of_exit_statuses_is_frozen():
    """Scripts and schedulers depend on these numbers."""
    assert {status.name: status.value for status in ExitStatus} == {
        "DONE": 0,
        "FAILED": 1,
        "TOO_MANY_FAILURES": 2,
        "REFUSED": 3,
        "HUNG_UP": 129,
        "INTERRUPTED": 130,
        "TERMINATED": 143,
    }


@pytest.mark.parametrize("flag", ["--image-cpu-s", "--image-wall-s", "--image-memory-bytes"])
def test_a_retry_names_the_flag_of_a_wrong_limit(flag, capsys):
    assert main(["retry", "out", flag, "0"]) == 3
    assert capsys.readouterr().err.startswith(f"blip2 retry: {flag} must be above 0 and finite, got 0")
