"""Flags made from dataclasses: which are required, and renamed ones."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from blip2_actor.flags import Parser, add_flags, build, formerly, with_current_names


@dataclass(frozen=True, kw_only=True)
class Inner:
    new_name: bool = field(default=False, metadata=formerly("old_name"))
    """Renamed."""


@dataclass(frozen=True, kw_only=True)
class Outer:
    must: str
    """Has no default."""
    may: int = 1
    """Has one."""
    inner: Inner = field(default=Inner())
    """a group"""


def make_parser() -> Parser:
    parser = Parser(prog="program")
    add_flags(parser, Outer)
    return parser


def test_help_shows_which_flags_are_required(capsys) -> None:
    """The parser itself checks required flags, so argparse used to show all flags in brackets."""
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--help"])
    usage = capsys.readouterr().out
    assert "[--may INT]" in usage
    assert "--must MUST" in usage and "[--must" not in usage


def test_a_required_flag_must_be_given_after_help_too(capsys) -> None:
    parser = make_parser()
    for arguments in (["--help"], [], ["--may", "2"]):
        with pytest.raises(SystemExit):
            parser.parse_args(arguments)
    assert "--must must be given" in capsys.readouterr().err
    assert build(Outer, vars(parser.parse_args(["--must", "x"]))) == Outer(must="x")


def test_former_names_are_read_at_every_depth() -> None:
    stored = {"must": "x", "inner": {"old_name": True}, "unknown": {"old_name": 1}}
    assert with_current_names(Outer, stored) == {
        "must": "x",
        "inner": {"new_name": True},
        "unknown": {"old_name": 1},
    }


@dataclass(frozen=True, kw_only=True)
class Switches:
    no_wait: bool = False
    """A name that looks like an opposite."""
    wait_until_tomorrow: bool = False
    """Not at all; argparse cuts --wait-until-tomorrow after a hyphen, where a line ends."""


def test_a_switch_whose_name_begins_with_no_is_switched_on_by_it() -> None:
    parser = Parser(prog="program")
    add_flags(parser, Switches)
    assert build(Switches, vars(parser.parse_args(["--no-wait"]))).no_wait
    assert not build(Switches, vars(parser.parse_args(["--no-wait", "--no-no-wait"]))).no_wait


def test_help_never_cuts_a_flag_in_two(monkeypatch) -> None:
    for columns in range(60, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        parser = Parser(prog="program")
        add_flags(parser, Switches)
        assert parser.format_help().partition("options:")[2].count("--wait-until-tomorrow") == 2
