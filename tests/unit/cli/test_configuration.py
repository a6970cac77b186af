"""`--config`, `blip2 config` and `blip2 completion`, through the command line."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import deploy.command
from pipeline.cli.completion import SHELLS
from pipeline.cli.main import main, parse
from pipeline.submit.settings import SubmitSettings
from tests.unit.progress.test_console import terminal

FILE = """
[caption]
model = "demo"
num-beams = 3
[plan]
sample = 8
[serve]
model = "demo"
port = 8123
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blip2.toml").write_text(FILE)
    return "blip2.toml"


def test_a_plan_is_of_the_command_in_the_file(file: str) -> None:
    _, given = parse(["plan", "photos", "--config", file])
    assert (given.model, given.num_beams, given.sample) == ("demo", 3, 8)


def test_config_prints_what_a_command_line_comes_to(file: str, capsys) -> None:
    assert main(["config", "caption", "photos", "-o", "out", "--config", file]) == 0
    said = capsys.readouterr().out
    assert tomllib.loads(said) == {
        "caption": {"input": ["photos"], "output": "out", "model": "demo", "num-beams": 3}
    }
    assert 'model = "demo"  # blip2.toml' in said and 'output = "out"  # command line' in said
    assert main(["config", "--json", "caption", "photos"]) == 0
    rows = {row["flag"]: row for row in json.loads(capsys.readouterr().out)["settings"]}
    assert rows["--num-beams"] == {"flag": "--num-beams", "value": 1, "from": "default"}


def test_a_terminal_does_not_wrap_what_is_a_configuration_file(monkeypatch) -> None:
    """A long value used to be broken into two lines, which TOML refuses."""
    prompt = "a prompt that is longer than a line of the terminal, by far"
    with terminal(40) as (stream, shown):
        monkeypatch.setattr("sys.stdout", stream)
        assert main(["config", "caption", "photos", "-o", "out", "--prompt", prompt]) == 0
    assert tomllib.loads(shown[0].replace("\r\n", "\n"))["caption"]["prompt"] == prompt


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_config_prints_toml_in_every_encoding(file: str, encoding: str, monkeypatch) -> None:
    prompt = "caf\xe9 · \u732b \U0001f408"
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding, newline=""))
    assert main(["config", "caption", "photos", "-o", "out", "--prompt", prompt]) == 0
    assert tomllib.loads(raw.getvalue().decode(encoding))["caption"]["prompt"] == prompt


def test_config_refuses_what_the_command_would_refuse(file: str, capsys) -> None:
    assert main(["config", "caption", "photos", "-o", "out", "--num-beams", "0"]) == 3
    assert "--num-beams must be at least 1, got 0" in capsys.readouterr().err


def test_config_prints_infinity_as_toml_and_as_json_have_it(tmp_path: Path, capsys) -> None:
    command = ["config", "caption", "photos", "-o", "out", "--step-timeout-s"]
    assert main([*command, "inf"]) == 0
    printed = tmp_path / "printed.toml"
    printed.write_text(capsys.readouterr().out)
    _, given = parse(["caption", "--config", str(printed)])
    assert given.step_timeout_s == float("inf")
    assert main(["config", "--json", *command[1:], "inf"]) == 0
    rows = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["settings"]
    assert [row["value"] for row in rows if row["flag"] == "--step-timeout-s"] == ["inf"]


def test_config_refuses_what_the_endpoint_would_refuse(file: str, capsys) -> None:
    assert deploy.command.main(["config", "--config", file, "--num-beams", "0"]) == 3
    said = capsys.readouterr()
    assert said.err == "blip2 serve: --num-beams must be at least 1, got 0\n" and not said.out


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 5000])
def test_a_file_that_python_cannot_read_is_named(value: str, file: str, capsys) -> None:
    Path(file).write_text(f"[caption]\nlimit = {value}\n")
    with pytest.raises(SystemExit, match="3"):
        main(["caption", "photos", "-o", "out", "--config", file])
    assert f"--config must be a TOML file, got {file}: " in capsys.readouterr().err


def test_the_endpoint_has_its_part(file: str, capsys) -> None:
    assert deploy.command.main(["config", "--config", file]) == 0
    assert tomllib.loads(capsys.readouterr().out) == {"serve": {"model": "demo", "port": 8123}}


def test_a_submitted_job_does_not_need_the_file(tmp_path: Path, monkeypatch) -> None:
    """The file is on this machine, but the job runs on another."""
    seen = []

    def submit(settings: SubmitSettings) -> int:
        seen.append(settings.job)
        return 0

    monkeypatch.setattr("pipeline.submit.submit.submit", submit)
    path = tmp_path / "b.toml"
    path.write_text('[caption]\nmodel = "demo"\nkeep = ["txt", "json"]\nreuse-identical = true\n')
    assert main(["submit", "caption", "s3://b/in", "-o", "s3://b/out", "--config", str(path)]) == 0
    job = seen[0]
    words = ["--input=s3://b/in", "--output=s3://b/out", "--keep=txt", "--keep=json", "--reuse-identical"]
    assert job[0] == "caption" and set(job[1:]) == {*words, "--model=demo"}
    command = ["submit", "caption", "s3://b/in", "-o", "s3://b/out", "--config", str(path)]
    assert main([*command, "--log-level", "debug"]) == 0
    assert seen[1][-2:] == ("--log-level", "debug")


def test_verbose_prints_the_traceback_of_an_error(tmp_path: Path) -> None:
    for words, has_traceback in ([], False), (["-v"], True):
        command = [sys.executable, "-m", "pipeline", "status", str(tmp_path / "nothing"), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 3
        assert ("Traceback" in done.stderr) is has_traceback
        assert done.stderr.splitlines()[-1].startswith("blip2: ")


BASH = """
source /dev/stdin
complete_words() {
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
    "$(complete -p blip2 | sed 's/.*-F \\([^ ]*\\).*/\\1/')"
    echo "${COMPREPLY[*]}"
}
complete_words blip2 capt
complete_words blip2 caption --dty
complete_words blip2 caption --dtype fl
complete_words blip2 serve --po
complete_words blip2 completion z
complete_words blip2 show photo
"""


def test_bash_completes_commands_flags_choices_and_files(tmp_path: Path, capsys) -> None:
    (tmp_path / "photos").mkdir()
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    done = subprocess.run(
        ["bash", "-c", BASH], input=script, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["caption", "--dtype", "float32 float16", "--port", "zsh", "photos"]


@pytest.mark.parametrize("shell", [shell for shell in SHELLS if shell != "bash"])
def test_other_shells_get_a_script_with_every_command(shell: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr("pipeline.cli.completion._flags_of_serve", lambda: ["--port"])
    assert main(["completion", shell]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("caption", "max-new-tokens", "bfloat16", "port"))
