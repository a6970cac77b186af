"""Flags from dataclasses: what is required, and names that have changed."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from blip2_actor import GenerationOptions
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
    """The parser checks them itself, so argparse showed all flags in brackets."""
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


def test_flags_of_transformers_name_ours(capsys) -> None:
    """The nearest flag by letters is one about something else."""
    parser = Parser(prog="blip2 caption")
    add_flags(parser, GenerationOptions)
    parser.add_argument("--max-slots")
    for ours in ("--max-new-tokens", "--min-new-tokens"):
        with pytest.raises(SystemExit):
            parser.parse_args([ours.replace("new-tokens", "length"), "20"])
        assert f"did you mean {ours}?" in capsys.readouterr().err
