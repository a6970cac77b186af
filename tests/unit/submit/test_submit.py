"""What `blip2 submit` refuses and what it sends, without a cluster."""

from __future__ import annotations

import json
import re
import shlex
import typing
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
from aiohttp import ServerDisconnectedError
from ray.exceptions import AuthenticationError

from blip2_actor.flags.fields import field_docs
from pipeline.cli.command_table import COMMANDS
from pipeline.cli.main import main, parse, read_job
from pipeline.errors import RayStartFailed
from pipeline.progress import Console, choose_style
from pipeline.submit.cluster_job import begin, follow, running_job
from pipeline.submit.job_command import JobCommand, check_command
from pipeline.submit.package import packed
from pipeline.submit.settings import JOBS, SubmitSettings
from pipeline.submit.submit import _end

IN, OUT = "s3://bucket/in", "s3://bucket/captions"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ("", 3, "a command must come last, one of caption, embed, score, retry, plan"),
        (f"caption --input {IN} --ouptut {OUT}", 3, "did you mean --output?"),
        (f"caption --input {IN} --output {OUT} --num-beams 0", 3, "--num-beams must be at least 1, got 0"),
        (f"-- caption --input {IN} --output {OUT}", 3, "--address must be given, or RAY_API_SERVER_ADDRESS"),
        (f"plan --input {IN}", 3, "--on-cluster must be set for a submitted plan"),
        (f"caption --input {IN} --output captions", 3, "--output must be a URI or an absolute path"),
        (f"caption --input {IN} --output {OUT} --calibration c.json", 3, "--calibration must be a URI or an"),
        (
            f"--address http://h:99999 plan --input {IN} --on-cluster",
            3,
            "--address must be a URI whose host",
        ),
        (
            f"--address http://127.0.0.1:1 caption --input {IN}?region=us-east-1 --output {OUT}",
            1,
            "cannot reach the dashboard of a Ray cluster at http://127.0.0.1:1: ",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(arguments, status, said, capsys, monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    try:
        found = main(["submit", *arguments.split()])
    except SystemExit as end:
        found = int(end.code or 0)
    assert found == status
    assert said in capsys.readouterr().err


def test_an_address_in_the_environment_is_checked_as_the_flag_is(capsys, monkeypatch):
    """The whole address used to be looked up as a host, and the cluster reported as unreachable."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "127.0.0.1:8265")
    assert main(["submit", "caption", "--input", IN, "--output", OUT]) == 3
    assert "RAY_API_SERVER_ADDRESS must be that of the dashboard" in capsys.readouterr().err


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., JobCommand]:
    """Return the job that a command line sends, from a folder that holds checkpoints and files."""
    monkeypatch.chdir(tmp_path)
    for folder in ("tuned", "demo"):
        Path(folder).mkdir()
    for file in ("lora.pth", "c.json", "keys.txt"):
        Path(file).touch()

    def send(*arguments: str) -> JobCommand:
        job = read_job(arguments)
        return check_command(job["job"], job["job_flags"])

    return send


CAPTION = ("caption", "--input", IN, "--output", OUT)
RETRY = ("retry", "--output", OUT)
SCORE = ("score", "--input", IN, "--output", OUT, "--text-column", "alt")
PATHS = {
    "input": ("caption", "--output", OUT, "--input"),
    "output": ("caption", "--input", IN, "--output"),
    "model": (*CAPTION, "--model"),
    "adapter": (*CAPTION, "--adapter"),
    "score_model": (*SCORE, "--score-model"),
    "calibration": (*CAPTION, "--calibration"),
    "keys": (*RETRY, "--keys"),
    "endpoint_key_file": (*CAPTION, "--endpoint", "http://captions:8000", "--endpoint-key-file"),
}
"""For each setting that names a file or a folder: a command line to complete with a path."""


@pytest.mark.parametrize(
    ("name", "path"),
    [
        *((name, "./here") for name in PATHS),
        *((name, "~/here") for name in PATHS),
        ("input", "photos"),
        ("input", "@list.txt"),
        ("output", "captions"),
        ("model", "tuned"),
        ("adapter", "lora.pth"),
        ("score_model", "tuned"),
        ("calibration", "c.json"),
        ("keys", "keys.txt"),
        ("endpoint_key_file", "keys.txt"),
    ],
)
def test_a_path_that_is_another_one_on_the_cluster_is_refused(name, path, sent):
    with pytest.raises(
        ValueError, match=f"^{name} must be a URI or an absolute path in a submitted job, got "
    ):
        sent(*PATHS[name], path)


@pytest.mark.parametrize("name", PATHS)
def test_a_path_on_a_shared_disk_and_one_in_a_bucket_are_taken(name, sent):
    for path in ("/data/place", "s3://bucket/place"):
        assert shlex.split(sent(*PATHS[name], path).entrypoint)[-1] == path


@pytest.mark.parametrize("name", PATHS)
def test_a_password_is_refused_and_not_said(name, sent):
    with pytest.raises(ValueError, match=f"^{name} must hold no password") as refusal:
        sent(*PATHS[name], "s3://me:word@bucket/place")
    assert str(refusal.value).count("word") == str(refusal.value).count("password")


def test_an_option_of_a_uri_may_be_a_password(sent):
    with pytest.raises(ValueError, match="input must hold no password"):
        sent("caption", "--output", OUT, "--input", "https://a/b.tar?signature=word")


def test_a_checkpoint_that_every_machine_knows_by_name_is_taken(sent):
    for model in ("demo", "Salesforce/blip2-opt-2.7b"):  # a folder demo exists, but the name means the model
        sent(*CAPTION, "--model", model)


def test_every_flag_of_a_job_that_names_a_file_is_checked():
    """A new flag needs a decision: the help of one that names a file begins with the kind of file."""
    of_jobs = [command.settings for name, command in COMMANDS.items() if name.split()[0] in JOBS]
    names = {
        name
        for settings in of_jobs
        for part in (settings, *(one for one in get_type_hints(settings).values() if is_dataclass(one)))
        for name, text in field_docs(typing.cast(type, part)).items()
        if re.match(r"(Tar f|F)iles?\b|Folder|Hub name|LoRA|Retrieval checkpoint", text)
    }
    assert names == set(PATHS)


def test_a_path_in_a_configuration_file_is_checked_too(sent):
    Path("blip2.toml").write_text('[caption]\ncalibration = "c.json"\n')
    with pytest.raises(ValueError, match="calibration must be a URI or an absolute path"):
        sent(*CAPTION, "--config", "blip2.toml")
    Path("blip2.toml").write_text('["plan embed"]\nsample = 8\n')
    job = sent("plan", "embed", "--input", IN, "--on-cluster", "--config", "blip2.toml")
    assert job.entrypoint == f"python -m pipeline plan embed --input={IN} --sample=8 --on-cluster"


@pytest.mark.parametrize("flags", ["--json -v", "-q", "--json --log-level info", "-q -v --num-beams 2"])
def test_a_job_with_a_configuration_file_has_all_its_flags(flags, sent):
    """--json, -v and -q used to be left out of the command that is sent."""
    Path("blip2.toml").write_text("[caption]\nmax-new-tokens = 5\n")
    arguments = [*CAPTION, "--config", "blip2.toml", *flags.split()]
    _, sent_flags = parse(sent(*arguments).arguments)
    of_the_file = {"config", "parser", "sources"}
    _, given = parse(arguments)
    assert {k: v for k, v in vars(sent_flags).items() if k not in of_the_file} == {
        k: v for k, v in vars(given).items() if k not in of_the_file
    }


def test_an_address_is_that_of_the_dashboard():
    with pytest.raises(ValueError, match="address must be that of the dashboard, such as http://"):
        SubmitSettings(job=("caption",), address="head:6379")


def command(output: str, *flags: str) -> Any:
    arguments = ["caption", "--input", IN, "--output", output, *flags]
    return check_command(arguments, {"input": [IN], "output": output})


def test_the_name_of_a_job_is_that_of_its_output():
    first = command(OUT)
    assert first.submission_id.startswith("blip2-captions-")
    assert first.submission_id == command(f"{OUT}/").submission_id
    assert first.submission_id != command("s3://other/captions").submission_id
    assert command("/data/Große Bilder!").submission_id.startswith("blip2-gro-e-bilder-")
    assert first.entrypoint == f"python -m pipeline caption --input {IN} --output {OUT}"
    assert command(OUT, "--prompt", "what is it?").entrypoint.endswith("--prompt 'what is it?'")


@pytest.mark.parametrize(
    ("ended", "code", "status"),
    [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", None, 1), ("FAILED", -9, 1), ("STOPPED", None, 143)],
)
def test_the_last_line_of_json_has_the_exit_status_of_the_command(ended, code, status, capsys):
    """A stopped job used to have no such line."""
    choose_style("json")
    try:
        assert _end(ended, code, command(OUT), "blip2-1", Console()) == status
    finally:
        choose_style("text")
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["event"], last["exit_status"]) == ("end", status)


def test_only_the_packages_are_sent():
    with packed() as package:
        names = {
            str(path.relative_to(package.folder)) for path in package.folder.rglob("*") if path.is_file()
        }
        assert {name.partition("/")[0] for name in names} == {"blip2_actor", "pipeline"}
        assert {"pipeline/__main__.py", "blip2_actor/demo/scenes.py"} <= names
        assert not [name for name in names if "__pycache__" in name]
        assert package.num_files == len(names) and package.num_bytes > 1_000_000
    assert not package.folder.exists()


class Client:
    """The used part of Ray's client, with jobs in memory."""

    def __init__(self, **jobs: str) -> None:
        self.jobs = {name.replace("_", "-"): status for name, status in jobs.items()}
        self.submitted: dict[str, Any] = {}
        self.log = ["one\n", "two\n", "three\n"]
        self.broken = 2
        self.breaks_by: Exception = RuntimeError("the connection is lost")

    def list_jobs(self) -> list[Any]:
        return [
            SimpleNamespace(submission_id=name, status=SimpleNamespace(value=status), entrypoint="x")
            for name, status in self.jobs.items()
        ]

    def submit_job(self, **job: Any) -> str:
        if job["submission_id"] in self.jobs:
            trace = (
                f"Traceback (most recent call last):\n  File\nValueError: {job['submission_id']} exists.\n"
            )
            raise RuntimeError(f"Request failed with status code 400: {trace}.")
        self.submitted = job
        return job["submission_id"]

    def get_job_info(self, name: str) -> Any:
        return SimpleNamespace(status=SimpleNamespace(value=self.jobs[name]))

    async def tail_job_logs(self, name: str):
        for number, text in enumerate(self.log):
            if number == self.broken:
                self.broken = -1
                raise self.breaks_by
            yield text


def test_attempts_are_numbered_and_one_that_runs_is_found():
    job = command(OUT)
    client: Any = Client()
    client.jobs = {job.submission_id: "FAILED", f"{job.submission_id}-2": "RUNNING", "another": "RUNNING"}
    running = running_job(client, job)
    assert running is not None and running.submission_id == f"{job.submission_id}-2"
    client.jobs[f"{job.submission_id}-2"] = "STOPPED"
    assert running_job(client, job) is None
    with packed() as package:
        assert begin(client, job, package) == f"{job.submission_id}-3"
        assert client.submitted["runtime_env"]["working_dir"] == str(package.folder)
    assert client.submitted["entrypoint"] == job.entrypoint


def test_the_next_attempt_has_a_new_number_although_an_earlier_one_was_deleted():
    """After `ray job delete`, the number of attempts used to be that of an existing attempt."""
    job = command(OUT)
    client: Any = Client()
    for there in (["-2"], ["-2", "-10"], [""], ["", "-3"], ["-other"]):
        client.jobs = {f"{job.submission_id}{rest}": "FAILED" for rest in there}
        with packed() as package:
            assert begin(client, job, package) not in client.jobs


def test_a_cluster_that_does_not_take_a_job_says_why(monkeypatch):
    """Another user may submit the same command at the same time, which used to end in a traceback."""
    job = command(OUT)
    client: Any = Client()
    client.jobs = {job.submission_id: "RUNNING"}
    monkeypatch.setattr(client, "list_jobs", list)
    with packed() as package, pytest.raises(RayStartFailed) as refused:
        begin(client, job, package)
    assert str(refused.value) == (
        f"the Ray cluster has not taken the job: ValueError: {job.submission_id} exists; look at its "
        "dashboard, and run the same command again"
    )
    monkeypatch.setattr(client, "list_jobs", lambda: client.submit_job(submission_id=job.submission_id))
    with pytest.raises(RayStartFailed, match="the Ray cluster has not listed its jobs: "):
        running_job(client, job)


def test_a_token_that_is_missing_is_said(monkeypatch):
    """The error of Ray's client is not an OSError, so the command used to end with a traceback."""

    def deny() -> None:
        raise AuthenticationError("Authentication required: no token\n\nMore")

    client: Any = Client()
    monkeypatch.setattr(client, "list_jobs", deny)
    with pytest.raises(RayStartFailed, match="required: no token; set RAY_AUTH_MODE=token, and give the tok"):
        running_job(client, command(OUT))


@pytest.mark.parametrize("error", [RuntimeError("lost"), ServerDisconnectedError()], ids=repr)
def test_the_log_is_written_once_although_the_connection_breaks(error, monkeypatch):
    """A proxy or tunnel breaks the connection with an aiohttp error, which used to end the command."""
    monkeypatch.setattr("pipeline.submit.cluster_job.POLL_S", 0.0)
    client: Any = Client(job="SUCCEEDED")
    client.breaks_by = error
    written: list[str] = []
    assert follow(client, "job", written.append).status.value == "SUCCEEDED"
    assert "".join(written) == "one\ntwo\nthree\n"
