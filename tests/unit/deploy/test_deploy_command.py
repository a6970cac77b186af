"""`python -m deploy` refuses what cannot work before it starts anything."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from deploy.__main__ import main


def test_a_taken_port_is_refused_by_number(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--model", "demo", "--port", str(port)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: port must be free") and str(port) in said


def test_an_unknown_model_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert main(["--model", str(tmp_path / "nothing"), "--port", str(port)]) == 1
    assert str(tmp_path / "nothing") in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--dtype", "int8"], ["--model", ""]])
def test_senseless_flags_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert main([*flags, "--port", str(port)]) == 1
    assert flags[0].removeprefix("--") in capsys.readouterr().err
