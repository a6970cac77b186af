"""The first line after a wrong command must say what to type instead.

The table is tests/unit/cli/wrong_commands.txt: a command, and below it the expected first line.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from blip2_actor.flags.suggestions import _FLAG, _HABITS
from pipeline.cli.command_table import COMMANDS, HABITS, OTHERS
from tests.contracts.test_cli_frozen import commands, flags_of, run_command

TABLE = Path(__file__).with_name("wrong_commands.txt").read_text(encoding="utf-8").splitlines()
WRONG = [(command.removeprefix("$ blip2 "), line) for command, line in zip(*[iter(TABLE)] * 2, strict=True)]


@pytest.mark.parametrize(("arguments", "first_line"), WRONG)
def test_the_first_line_says_what_to_type(
    arguments: str, first_line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(arguments) == 3
    assert capsys.readouterr().err.splitlines()[0] == first_line


def test_the_table_is_as_long_as_it_should_be() -> None:
    assert len(WRONG) >= 40


def test_a_folder_in_place_of_a_command(tmp_path, capsys) -> None:
    assert run_command(str(tmp_path)) == 3
    assert f"did you mean blip2 caption {tmp_path} -o OUTPUT?" in capsys.readouterr().err


def test_advice_names_flags_and_commands_that_exist() -> None:
    """Advice for flags that no command has would never be given, and nobody would notice it."""
    flags = [{*flags_of(name), "--log-level"} for name in commands()]
    for advice in _HABITS:
        assert any(set(_FLAG.findall(advice)) <= known for known in flags), advice
    assert set(HABITS.values()) <= {*COMMANDS, *OTHERS}
    assert not set(HABITS) & {*COMMANDS, *OTHERS}


@pytest.mark.parametrize(("arguments", "begins"), [("", "usage: blip2"), ("version", "blip2-ray ")])
def test_what_people_type_first_is_answered(
    arguments: str, begins: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(arguments) == 0
    assert capsys.readouterr().out.startswith(begins)
