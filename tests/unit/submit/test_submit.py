"""What `blip2 submit` refuses and sends, without a cluster."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from blip2_actor import EngineConfig
from pipeline.cli.main import main
from pipeline.settings.job_settings import CaptionSettings, ScoreSettings
from pipeline.settings.retry_settings import RetrySettings
from pipeline.submit.cluster_job import begin, follow, running_job
from pipeline.submit.job_command import check_command
from pipeline.submit.package import packed
from pipeline.submit.settings import SubmitSettings

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


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (CaptionSettings(input=("in",), output=OUT), "input must be a URI or an absolute path"),
        (RetrySettings(output="/out", keys="keys.txt"), "keys must be a URI or an absolute path"),
        (CaptionSettings(input=(IN,), output="s3://me:word@bucket/out"), "output must hold no password"),
        (
            CaptionSettings(input=("https://a/b.tar?signature=word",), output=OUT),
            "input must hold no password",
        ),
        (CaptionSettings(input=("@list.txt",), output=OUT), "input must be a URI or an absolute path"),
        (CaptionSettings(input=("@s3://me:word@bucket/list",), output=OUT), "input must hold no password"),
        (
            CaptionSettings(input=(IN,), output=OUT, engine=EngineConfig(adapter="s3://me:word@bucket/lora")),
            "adapter must hold no password",
        ),
        (
            ScoreSettings(input=(IN,), output=OUT, text_column="alt", score_model="tests"),
            "score_model must be a URI or an absolute path",
        ),
    ],
)
def test_a_path_that_is_another_one_on_the_cluster_and_a_password_are_refused(settings, said):
    with pytest.raises(ValueError, match=said) as refusal:
        check_command([], settings)
    assert str(refusal.value).count("word") == str(refusal.value).count("password")


def test_a_manifest_on_a_shared_disk_or_in_a_bucket_is_taken():
    for manifest in ("@/data/list.txt", "@s3://bucket/list.txt"):
        assert check_command([], CaptionSettings(input=(manifest,), output=OUT)).output == OUT


def test_an_address_is_that_of_the_dashboard():
    with pytest.raises(ValueError, match="address must be that of the dashboard, such as http://"):
        SubmitSettings(job=("caption",), address="head:6379")


def command(output: str, *flags: str) -> Any:
    arguments = ["caption", "--input", IN, "--output", output, *flags]
    return check_command(arguments, CaptionSettings(input=(IN,), output=output))


def test_the_name_of_a_job_is_that_of_its_output():
    first = command(OUT)
    assert first.submission_id.startswith("blip2-captions-")
    assert first.submission_id == command(f"{OUT}/").submission_id
    assert first.submission_id != command("s3://other/captions").submission_id
    assert command("/data/Große Bilder!").submission_id.startswith("blip2-gro-e-bilder-")
    assert first.entrypoint == f"python -m pipeline caption --input {IN} --output {OUT}"
    assert command(OUT, "--prompt", "what is it?").entrypoint.endswith("--prompt 'what is it?'")


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
    """The part of Ray's client that is used, with jobs in memory."""

    def __init__(self, **jobs: str) -> None:
        self.jobs = {name.replace("_", "-"): status for name, status in jobs.items()}
        self.submitted: dict[str, Any] = {}
        self.log = ["one\n", "two\n", "three\n"]
        self.broken = 2

    def list_jobs(self) -> list[Any]:
        return [
            SimpleNamespace(submission_id=name, status=SimpleNamespace(value=status), entrypoint="x")
            for name, status in self.jobs.items()
        ]

    def submit_job(self, **job: Any) -> str:
        self.submitted = job
        return job["submission_id"]

    def get_job_info(self, name: str) -> Any:
        return SimpleNamespace(status=SimpleNamespace(value=self.jobs[name]))

    async def tail_job_logs(self, name: str):
        for number, text in enumerate(self.log):
            if number == self.broken:
                self.broken = -1
                raise RuntimeError("the connection is lost")
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


def test_the_log_is_written_once_although_the_connection_breaks(monkeypatch):
    monkeypatch.setattr("pipeline.submit.cluster_job.POLL_S", 0.0)
    client: Any = Client(job="SUCCEEDED")
    written: list[str] = []
    assert follow(client, "job", written.append).status.value == "SUCCEEDED"
    assert "".join(written) == "one\ntwo\nthree\n"
