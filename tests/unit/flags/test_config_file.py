"""A configuration file sets flags: the same names, types and messages."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from blip2_actor.flags import (
    Parser,
    add_flags,
    build,
    effective_settings,
    positional,
    settings_as_json,
    settings_as_toml,
    settings_as_words,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    input: tuple[str, ...] = field(metadata=positional())
    """What to read."""
    limit: int | None = None
    """How much of it."""
    keep: tuple[str, ...] = ()
    """What to keep."""
    mode: bool | Literal["never"] = False
    """A switch with a third value."""
    deadline: str | None = None
    """When to stop."""
    fork: bool = False
    """Start anew."""


PART = """
[run]
input = ["a b", "-c"]
limit = 3
keep = ["x", "y"]
mode = "never"
deadline = 2026-01-31T18:00:00
fork = true
[other]
unknown = 1
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "blip2.toml"
    path.write_text(PART)
    return path


def make_parser() -> Parser:
    parser = Parser(prog="run", parts=["base", "run"])
    add_flags(parser, Settings)
    return parser


def test_values_of_a_file_are_those_of_flags(file: Path) -> None:
    given = make_parser().parse_args(["--config", str(file)])
    assert build(Settings, vars(given)) == Settings(
        input=("a b", "-c"),
        limit=3,
        keep=("x", "y"),
        mode="never",
        deadline="2026-01-31T18:00:00",
        fork=True,
    )


def test_the_command_line_overrules_the_file_also_in_switches_and_lists(file: Path) -> None:
    words = ["z", "--config", str(file), "--no-fork", "--keep", "w", "--mode", "true"]
    settings = build(Settings, vars(make_parser().parse_args(words)))
    assert (settings.input, settings.fork, settings.keep, settings.mode) == (("z",), False, ("w",), True)
    assert settings.limit == 3


def test_a_later_part_overrules_an_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "two.toml"
    path.write_text('[run]\nlimit = 2\n[base]\nlimit = 1\nkeep = ["x"]\n')
    settings = build(Settings, vars(make_parser().parse_args(["a", "--config", str(path)])))
    assert (settings.limit, settings.keep) == (2, ("x",))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[run]\nlimt = 3", "there is no flag --limt; did you mean --limit?"),
        ('[run]\nlimit = "three"', "--limit must be a whole number, got three"),
        ("[run]\nlimit = 2.5", "--limit must be a whole number, got 2.5"),
        ("[run]\nlimit = [1, 2]", "--limit must be one value, got a list of 2"),
        ('[run]\nfork = "yes"', '--fork must be true or false, got "yes"'),
        ("[run]\nno-fork = false", "there is no flag --no-fork; did you mean --fork?"),
        ("[run.deadline]\nhour = 3", "--deadline must be a text, a number or a list, got a table"),
        ("[run]\nkeep = [{a = 1}]", "--keep must be a text, a number or a list, got a table"),
        ('[run]\nconfig = "other.toml"', "there is no flag --config"),
        ("[run]\nlog-level = 1\nlog_level = 2", "log_level are the same flag; leave one of them out"),
        ("[run]\nhelp = true", "there is no flag --help"),
        ("limit = 3", "limit must stand in the part of a command, such as [run]"),
        ("[rum]\nlimit = 3", "must have a part [run], but it has [rum]; did you mean rum?"),
        ("", "must have a part [run], but it is empty"),
        ("[run\n", "--config must be a TOML file"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_name(tmp_path: Path, capsys, text, said) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        make_parser().parse_args(["a", "--config", str(path)])
    assert ended.value.code == 3
    first_line = capsys.readouterr().err.splitlines()[0]
    assert said in first_line and str(path) in first_line


def test_a_file_that_is_not_there(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args(["a", "--config", str(tmp_path / "no.toml")])
    assert "--config must be a file that can be read" in capsys.readouterr().err


def test_effective_settings_say_where_each_comes_from(file: Path) -> None:
    given = make_parser().parse_args(["--config", str(file), "--limit", "5"])
    settings = {one.flag: one for one in effective_settings(given, Settings)}
    assert {flag: one.source for flag, one in settings.items()} == {
        "--input": str(file),
        "--limit": "command line",
        "--keep": str(file),
        "--mode": str(file),
        "--deadline": str(file),
        "--fork": str(file),
    }
    assert settings["--limit"].value == 5
    rows = json.loads(settings_as_json("run", settings.values()))["settings"]
    assert rows[1] == {"flag": "--limit", "value": 5, "from": "command line"}


@pytest.mark.parametrize("words", [[], ["--limit", "5", "--no-fork"], ["--mode", "true", 'a"\\\x7f\n√']])
def test_printed_settings_give_the_same_settings_again(file: Path, tmp_path: Path, words) -> None:
    given = make_parser().parse_args(["--config", str(file), *words])
    settings = effective_settings(given, Settings)
    again = tmp_path / "again.toml"
    again.write_text("\n".join(settings_as_toml("run", settings)), encoding="utf-8")
    from_file = make_parser().parse_args(["--config", str(again)])
    from_words = make_parser().parse_args(settings_as_words(settings))
    assert (
        build(Settings, vars(from_file)) == build(Settings, vars(given)) == build(Settings, vars(from_words))
    )


def test_defaults_are_printed_as_comments() -> None:
    """As values they would override the checkpoint's own settings of generation."""
    given = make_parser().parse_args(["a"])
    lines = list(settings_as_toml("run", effective_settings(given, Settings)))
    assert tomllib.loads("\n".join(lines)) == {"run": {"input": ["a"]}}
    assert {"# limit is not set", "# mode = false", "# keep = []"} <= set(lines)


def test_settings_that_toml_cannot_hold_are_not_printed() -> None:
    settings = effective_settings(make_parser().parse_args(["photos\udcff"]), Settings)
    with pytest.raises(ValueError, match=r"--input must be UTF-8 in TOML, got .*udcff.*; use --json"):
        list(settings_as_toml("run", settings))


def test_words_after_two_dashes_are_values(tmp_path: Path) -> None:
    assert make_parser().parse_args(["--limit", "1", "--", "-photos", "b"]).input == ["./-photos", "b"]
