"""`blip2 serve` refuses settings that cannot work before it starts anything."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray

from blip2_actor import EngineConfig
from deploy import command, local_service
from deploy.command import main
from deploy.settings import ServeSettings


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture(autouse=True)
def checks_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check settings in this process, which has already imported torch; in a new one that takes seconds."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(command, "_in_child", lambda call, settings: call(settings))


def test_a_taken_port_is_refused_by_number(capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--model", "demo", "--port", str(port)]) == 3
    said = capsys.readouterr().err
    assert said.startswith(f"blip2 serve: port {port} of 127.0.0.1 cannot be used")


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_an_address_of_ipv6_is_served_and_shown_in_brackets(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its port used to be unusable: Address family for hostname not supported."""
    missing = tmp_path / "nowhere"
    assert main(["--host", "::1", "--port", str(free_port), "--model", str(missing)]) == 3
    assert "nowhere" in capsys.readouterr().err
    settings = ServeSettings(host="::1", port=1, engine=EngineConfig(model="x"))
    assert "curl -F image=@photo.jpg http://[::1]:1/v1/caption" in local_service._invitation(settings)


def test_bytes_that_are_not_utf8_are_printed_in_json_alone(capsys) -> None:
    words = ["--model", "demo", "--keys-file", "keys\udcff"]
    assert main(["config", *words]) == 3
    assert "--keys-file must be UTF-8 in TOML" in capsys.readouterr().err
    assert main(["config", "--json", *words]) == 0
    assert r"keys\udcff" in capsys.readouterr().out


def test_an_unknown_model_is_refused_by_name(tmp_path: Path, free_port: int, capsys) -> None:
    assert main(["--model", str(tmp_path / "nothing"), "--port", str(free_port)]) == 3
    assert str(tmp_path / "nothing") in capsys.readouterr().err


def test_an_empty_model_is_refused(free_port: int, capsys) -> None:
    assert main(["--model", "", "--port", str(free_port)]) == 3
    assert "model must be" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--keys-file", "--admin-keys-file"])
def test_a_missing_file_of_keys_is_named_by_its_flag(flag: str, free_port: int, capsys) -> None:
    """It was "[Errno 2] No such file or directory"."""
    assert main(["--model", "demo", "--port", str(free_port), flag, "nothing.txt"]) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert f"{flag} must be a file that can be read, got nothing.txt: No such" in said
    assert said.endswith("python -m deploy.guard.keys NAME")


def test_an_empty_keys_file_is_refused(free_port: int, capsys) -> None:
    """An unset variable gives an empty name, which used to end in a traceback 20 s later."""
    assert main(["--model", "demo", "--port", str(free_port), "--keys-file", ""]) == 3
    assert capsys.readouterr().err == "blip2 serve: --keys-file must not be empty; leave it out\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["https://user:pa55word@host/x?sig=pa55word"],
        ["--host", "https://user:pa55word@host/x"],
        ["--keys-file", "https://user:pa55word@host/x?sig=pa55word"],
    ],
)
def test_a_refused_uri_is_shown_without_its_password(arguments: list[str], free_port: int, capsys) -> None:
    try:
        assert main(["--model", "demo", "--port", str(free_port), *arguments]) == 3
    except SystemExit as end:
        assert end.code == 3
    said = capsys.readouterr().err
    assert "host/x" in said
    assert "pa55word" not in said


def test_token_ids_that_the_model_does_not_have_are_refused(free_port: int, capsys) -> None:
    """Every request would have failed on them."""
    assert main(["--model", "demo", "--port", str(free_port), "--suppress-tokens", "999999"]) == 3
    assert "--suppress-tokens must be token ids below" in capsys.readouterr().err


def test_a_score_model_that_writes_text_is_refused_in_words_of_flags(free_port: int, capsys) -> None:
    """The message used to name only classes of Python."""
    assert main(["--model", "demo", "--score-model", "demo", "--port", str(free_port)]) == 3
    assert "one that writes text is used without --score-model" in capsys.readouterr().err


def test_a_ray_that_does_not_start_is_one_sentence_and_status_1(
    monkeypatch: pytest.MonkeyPatch, free_port: int, capsys
) -> None:
    """On a loaded machine Ray raises a plain Exception after 30 s, which used to be a traceback."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    monkeypatch.setattr(os, "environ", inherited)  # Ray's start would leave more variables behind

    def time_out(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because ...\nmore")

    monkeypatch.setattr(ray, "init", time_out)
    monkeypatch.setattr(local_service, "_set_on_signal", lambda stop: None)
    assert main(["--model", "demo", "--port", str(free_port)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("blip2 serve: Ray did not start on this machine: The current node timed out")
    assert said.endswith("run the same command again\n") and said.count("\n") == 1
    assert not ray.is_initialized()
    # Spinning threads cost two busy cores 147 ms of CPU time per request; waiting ones cost 11 ms.
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_the_lines_to_try_name_a_key_where_callers_have_one() -> None:
    """With keys, the lines used to make a picture of the 401, and to send that."""
    settings = ServeSettings(engine=EngineConfig(model="demo"), port=8123, keys_file="keys.txt")
    _, *lines = local_service._invitation(settings).splitlines()
    assert len(lines) == 2
    assert all('curl -H "Authorization: Bearer $BLIP2_KEY" -' in line for line in lines)
    assert "Bearer" not in local_service._invitation(dataclasses.replace(settings, keys_file=None))


def test_all_settings_reach_the_service(monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    """Slots, threads and limits used to have no flags, so the command could not set them."""
    served: list[ServeSettings] = []
    monkeypatch.setattr(local_service, "serve_until_stopped", served.append)
    flags = f"--model demo --max-slots 3 --num-threads 1 --max-new-tokens 7 --timeout-s 9 --port {free_port}"
    assert main([*flags.split(), "--image-max-pixels", "99"]) == 0
    [settings] = served
    assert settings.engine == EngineConfig(model="demo", max_slots=3, num_threads=1)
    assert (settings.options.max_new_tokens, settings.timeout_s, settings.port) == (7, 9.0, free_port)
    assert settings.image == dataclasses.replace(ServeSettings().image, max_pixels=99)


@pytest.mark.slow
def test_the_command_itself_imports_no_torch(tmp_path: Path, free_port: int) -> None:
    """To check the model, it used to hold 160 MiB of torch and transformers while the endpoint ran."""
    script = tmp_path / "serve.py"
    script.write_text(
        f"""if __name__ == "__main__":
    import sys
    from deploy import command, local_service
    local_service.serve_until_stopped = lambda settings: print("torch" in sys.modules)
    flags = ["--model", "demo", "--port", "{free_port}"]
    command.main(flags)
    sys.exit(command.main([*flags, "--suppress-tokens", "999999"]))
"""
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert run.stdout == "False\nstopped\n"
    assert (run.returncode, run.stderr.count("--suppress-tokens must be token ids below")) == (3, 1)


def test_nothing_imports_ray_before_its_token_is_set() -> None:
    """Ray reads the token when it is imported; imported too early, it waits in vain for its own processes."""
    modules = "deploy.command, deploy.local_service, deploy.reuse.finished_run"
    code = f"import sys, {modules}; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_gauges_are_shown_from_one_health_check_to_the_next() -> None:
    """Ray shows a gauge for two of its intervals after it is set: these used to be gone for 6 s of 10."""
    code = """if True:
    from deploy.local_service import set_ray_environment
    set_ray_environment()
    import ray
    from deploy.app import CAPTIONER, GATEWAY
    interval_s = ray._config.metrics_report_interval_ms() / 1000
    checks_s = [one._deployment_config.health_check_period_s for one in (CAPTIONER, GATEWAY)]
    assert interval_s >= max(checks_s), (interval_s, checks_s)"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    subprocess.run([sys.executable, "-c", code], env=environment, timeout=120, check=True)


def test_a_ray_that_does_not_start_ends_with_its_processes_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes: list[subprocess.Popen[bytes]] = []
    started: list[psutil.Process] = []

    def init(**_: object) -> None:
        nodes.append(subprocess.Popen(["sh", "-c", "sleep 60 & echo; wait"], stdout=subprocess.PIPE))
        assert nodes[0].stdout is not None and nodes[0].stdout.readline()
        process = psutil.Process(nodes[0].pid)
        started.extend([process, *process.children()])
        raise RuntimeError("too late")

    monkeypatch.setattr(ray, "init", init)
    of_another = subprocess.Popen(["sleep", "60"])
    try:
        with pytest.raises(local_service.RayStartFailed, match="too late"):
            local_service._start_ray(ServeSettings(engine=EngineConfig(model="x")))
        _, alive = psutil.wait_procs(started, timeout=10)
        assert len(started) == 2 and not alive
        assert of_another.poll() is None
    finally:
        of_another.kill()
        of_another.wait()
        for node in nodes:
            node.communicate()
