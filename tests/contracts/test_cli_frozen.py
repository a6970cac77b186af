"""The command line is a contract: scripts break when a flag or a default goes.

`python -m tests.contracts.test_cli_frozen` writes tests/contracts/cli.txt anew after a change that is meant.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blip2_actor.flags import build
from pipeline.cli.main import COMMANDS, main, make_parser

FROZEN = Path(__file__).with_name("cli.txt")


def surface() -> Iterator[str]:
    """Each flag of each command with its kind; defaults stand in the help of the flag."""
    parser = make_parser()
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name, sub in subparsers.choices.items():
        yield name
        for action in sub._actions:
            if action.dest == "help":
                continue
            default = (
                (action.help or "").rpartition("(default: ")[2].rstrip(")")
                if "(default: " in action.help
                else "-"
            )
            required = " required" if action.required else ""
            many = " many" if action.nargs == "+" else ""
            yield f"  {action.option_strings[0]} {action.metavar or 'switch'}{many}{required} {default}"


def test_surface_is_frozen():
    assert list(surface()) == FROZEN.read_text().splitlines()


def test_help_needs_neither_torch_nor_ray():
    """Help that takes ten seconds is not read."""
    code = (
        "import sys\n"
        "from pipeline.cli.main import main\n"
        "try: main(['caption', '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules), 'too much imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--max-failed-fraction" in done.stdout


def test_every_flag_has_help():
    parser = make_parser()
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for sub in subparsers.choices.values():
        assert all(action.help for action in sub._actions)


@pytest.mark.parametrize("command", ["caption", "embed", "score"])
def test_a_plan_takes_the_flags_of_its_command(command):
    """A command line is planned by putting `plan` in front of it."""
    parser = make_parser()
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    planned = set(commands["plan" if command == "caption" else f"plan {command}"]._option_string_actions)
    flags = set(commands[command]._option_string_actions)
    assert (planned - flags, flags - planned) == ({"--sample", "--json"}, {"--fork"})


def test_defaults_are_those_of_the_dataclasses():
    given = vars(make_parser().parse_args(["caption", "--input", "in", "--output", "out"]))
    settings = COMMANDS["caption"].settings
    assert build(settings, given) == settings(input=("in",), output="out")


def test_flags_reach_the_dataclasses_inside():
    arguments = "caption --input a b --output o --model demo --num-beams 3 --early-stopping never --stop x"
    arguments += " --keep url caption2=caption --image-max-pixels 9 --max-actors 4 --jpeg-draft".replace(
        " --jpeg-draft", " --image-jpeg-draft"
    )
    settings = build(COMMANDS["caption"].settings, vars(make_parser().parse_args(arguments.split())))
    assert settings.input == ("a", "b")
    assert settings.engine.model == "demo"
    assert (settings.generation.num_beams, settings.generation.early_stopping) == (3, "never")
    assert settings.generation.stop == ("x",)
    assert settings.reading.keep == ("url", "caption2=caption")
    assert (settings.limits.max_pixels, settings.limits.jpeg_draft) == (9, True)
    assert settings.placement.max_actors == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("caption --input a --output b --pormpt x", "did you mean --prompt?"),
        ("caption --input a", "--output"),
        ("caption --input a --output b --dtype float8", "must be one of auto, float32"),
        ("caption --input a --output b --num-beams two", "num-beams"),
        ("transcribe", "transcribe"),
        ("", "COMMAND"),
    ],
)
def test_a_wrong_command_line_exits_with_1_and_says_what_is_right(arguments, said, capsys):
    """argparse itself exits with 2, which here says that too many rows failed."""
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    assert end.value.code == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--num-beams 0", "num_beams must be at least 1, got 0"),
        ("--max-failed-fraction 2", "max_failed_fraction must be from 0 to 1"),
        ("--temperature 0.5", "set do_sample"),
        ("--min-actors 3 --max-actors 2", "max_actors must be at least min_actors"),
        ("--keep sha256", "sha256"),
        ("--keep caption", "caption"),
        ("--prompt x --prompt-column y", "prompt"),
    ],
)
def test_settings_that_contradict_are_refused(arguments, said, capsys):
    assert main(["caption", "--input", "a", "--output", "b", *arguments.split()]) == 1
    assert said in capsys.readouterr().err


if __name__ == "__main__":
    FROZEN.write_text("".join(line + "\n" for line in surface()))
