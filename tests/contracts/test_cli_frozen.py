"""The command line is a contract: scripts break when a flag disappears or a default changes.

After an intended change, `python -m tests.contracts.test_cli_frozen` rewrites tests/contracts/cli.txt.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest

import deploy.command
from blip2_actor import EngineConfig, GenerationOptions
from blip2_actor.flags import Parser, build
from deploy.settings import OnlineImageLimits, ServeSettings
from pipeline.cli.main import COMMANDS, main, make_parser, parse
from tests.integration.inputs import png

FROZEN = Path(__file__).with_name("cli.txt")
REQUIRED = "--input a --output b --text-column c"
"""The flags that any command requires; a test removes those that its command does not have."""


@cache
def commands() -> Mapping[str, Parser]:
    """Return every subcommand with its parser, including the endpoint's for `serve`."""
    [action] = [a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return cast(dict[str, Parser], action.choices) | {"serve": deploy.command.make_parser()}


def surface() -> Iterator[str]:
    """Yield each flag of each command with its kind; the default is read from the help of the flag."""
    for name, command in commands().items():
        yield name
        for action in command._actions:
            if action.dest in ("help", "help_all"):
                continue
            help_text = action.help or ""
            default = help_text.rpartition("(default: ")[2].rstrip(")") if "(default: " in help_text else "-"
            required = " required" if action.required else ""
            many = " many" if action.nargs == "+" else ""
            names = [text for text in action.option_strings if text.startswith("--")] or [str(action.metavar)]
            letter = "".join(f" {text}" for text in action.option_strings if text[1] != "-")
            place = " positional" if action in command.positionals else ""
            kind = f"{action.metavar or 'switch'}{many}{required}{place}"
            yield f"  {names[0]} {kind} {default}{letter}"


def flags_of(command: str) -> set[str]:
    """Return the current flags of a command, without former names and opposites."""
    names = (
        [text for text in action.option_strings if text.startswith("--")]
        for action in commands()[command]._actions
    )
    return {found[0] for found in names if found}


def run_command(arguments: str) -> int:
    """Return the exit status of a command line; `serve` as the first word is the endpoint."""
    words = arguments.split()
    try:
        return deploy.command.main(words[1:]) if words[:1] == ["serve"] else main(words)
    except SystemExit as end:
        return cast(int, end.code)


def test_surface_is_frozen():
    assert list(surface()) == FROZEN.read_text().splitlines()


@pytest.mark.parametrize("module", ["pipeline.cli.main", "deploy.command"])
def test_help_imports_nothing_heavy(module):
    """Nobody reads help that takes ten seconds."""
    code = (
        "import sys\n"
        f"from {module} import main, make_parser\n"
        f"try: main(['caption', '--help-all'] if {module!r} == 'pipeline.cli.main' else ['--help-all'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'ray', 'transformers', 'pyarrow', 'numpy', 'pydantic', 'fastapi'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--max-new-tokens" in done.stdout


def test_every_flag_has_help_for_a_person_at_a_terminal():
    for command in commands().values():
        for action in command._actions:
            assert action.help, action.option_strings


def test_help_names_flags_and_shows_which_are_required(capsys):
    """A person at a terminal does not know the fields of a dataclass."""
    assert run_command("caption --help-all") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "usage: blip2 caption INPUT [INPUT ...] -o OUTPUT [FLAGS]" in said
    assert "or sampling with --do-sample." in said
    fields = {
        flag.removeprefix("--").replace("-", "_") for flag in commands()["caption"]._option_string_actions
    }
    assert not {field for field in fields if "_" in field and f" {field}" in said}


@pytest.mark.parametrize("command", [*COMMANDS, "serve"])
def test_examples_of_help_are_commands(command, capsys):
    """Short help of the long commands ends with three examples, and fits on two screens."""
    assert run_command(f"{command} --help") == 0
    said = capsys.readouterr().out
    examples = re.findall(r"^  blip2 (.+)$", said, re.MULTILINE)
    assert examples
    for example in examples:
        words = shlex.split(example)
        if words[0] in ("serve", "submit"):
            words = words[1:]
        parse(words) if words[0] in COMMANDS else deploy.command.make_parser().parse_args(words)
    if len(flags_of(command)) > 20:
        assert len(examples) >= (1 if command.startswith("plan ") else 3)
        assert len(said.splitlines()) < 90 and f"blip2 {command} --help-all shows all" in said


@pytest.mark.parametrize("command", ["caption", "embed", "score"])
def test_a_plan_takes_the_flags_of_its_command(command):
    """Putting `plan` in front of a command line plans it."""
    planned = flags_of("plan" if command == "caption" else f"plan {command}")
    flags = flags_of(command)
    assert planned - flags == {"--sample", "--on-cluster", "--price-per-hour"}
    only_for_runs = {"--fork", "--add-new", "--redo-changed", "--slice"}
    behind_an_endpoint = {"--endpoint", "--endpoint-key-file"} if command == "caption" else set()
    assert flags - planned == only_for_runs | behind_an_endpoint


def test_the_endpoint_takes_the_flags_of_the_engine():
    """`serve` used to have six flags of its own: slots, threads and compilation could not be set."""
    flags = set(commands()["serve"]._option_string_actions)
    shared = {flag for flag in flags if flag in commands()["caption"]._option_string_actions}
    assert {"--max-slots", "--num-threads", "--compile", "--device-map", "--num-beams"} <= shared
    assert {"--host", "--port", "--timeout-s", "--max-in-flight", "--decode-children"} <= flags


def test_defaults_are_those_of_the_dataclasses():
    given = vars(make_parser().parse_args(["caption", "--input", "in", "--output", "out"]))
    settings = COMMANDS["caption"].settings
    assert build(settings, given) == settings(input=("in",), output="out")
    served = build(ServeSettings, vars(deploy.command.make_parser().parse_args([])))
    assert served == ServeSettings()
    assert (served.engine, served.options) == (EngineConfig(), GenerationOptions())
    assert served.image == OnlineImageLimits(max_file_bytes=20 << 20, cpu_s=10.0, wall_s=30.0)


def test_flags_reach_the_dataclasses_inside():
    arguments = "caption --input a b --output o --model demo --num-beams 3 --early-stopping never --stop x"
    arguments += " --keep url caption2=caption --image-max-pixels 9 --max-actors 4 --image-jpeg-draft"
    given = vars(make_parser().parse_args(arguments.split()))
    settings: Any = build(COMMANDS["caption"].settings, given)
    assert settings.input == ("a", "b")
    assert settings.engine.model == "demo"
    assert (settings.generation.num_beams, settings.generation.early_stopping) == (3, "never")
    assert settings.generation.stop == ("x",)
    assert settings.reading.keep == ("url", "caption2=caption")
    assert (settings.limits.max_pixels, settings.limits.jpeg_draft) == (9, True)
    assert settings.placement.max_actors == 4


def test_the_old_name_of_a_flag_is_still_read():
    for flag in ("--skip-self-test", "--skip-canary"):
        given = vars(make_parser().parse_args(["caption", "--input", "a", "--output", "b", flag]))
        settings: Any = build(COMMANDS["caption"].settings, given)
        assert settings.engine.skip_self_test


@pytest.mark.parametrize("command", [*COMMANDS, "serve"])
@pytest.mark.parametrize("others", ["", REQUIRED])
def test_a_wrong_flag_of_any_command_exits_with_3_and_names_the_nearest(command, others, capsys):
    """It used to be hidden by "the following arguments are required", and `serve` exited with 2."""
    flags = commands()[command]._option_string_actions
    pairs = zip(*[iter(others.split())] * 2, strict=True)
    others = " ".join(f"{flag} {value}" for flag, value in pairs if flag in flags)
    right = next(flag for flag in ("--model", "--output", "--html", "--no-wait") if flag in flags)
    wrong = right[:-2] + right[:-3:-1]
    assert run_command(f"{command} {wrong} x {others}") == 3
    said = capsys.readouterr().err
    assert f"there is no flag {wrong}; did you mean {right}?" in said
    assert f"See blip2 {command} --help" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("caption --input a --output b --pormpt x", "did you mean --prompt?"),
        ("caption --input a --output b --pormpt=x", "there is no flag --pormpt; did you mean --prompt?"),
        ("caption --input a", "--output must be given"),
        ("caption", "--input and --output must be given"),
        ("caption --input a --output b --dtype float8", "must be one of auto, float32"),
        ("caption --input a --output b --num-beams two", ": --num-beams must be a whole number, got two\n"),
        ("caption --input a --output b --top-p half", ": --top-p must be a number, got half\n"),
        ("caption --input a --output b --fork=yes", ": --fork takes no value, got 'yes'\n"),
        ("caption --input a --output", ": --output needs a value\n"),
        ("caption --output b --input", ": --input needs at least one value\n"),
        ("serve --port eight", ": --port must be a whole number, got eight\n"),
        ("serve --dtype float8", ": --dtype must be one of auto, float32"),
        ("captoin --input a", "there is no command captoin; did you mean caption?"),
        ("transcribe", "there is no command transcribe"),
        ("--verzion", "did you mean --version?"),
    ],
)
def test_a_wrong_command_line_exits_with_3_and_says_what_is_right(arguments, said, capsys):
    """argparse itself exits with 2, which for these commands means that too many rows failed."""
    assert run_command(arguments) == 3
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--num-beams 0", "--num-beams must be at least 1, got 0"),
        ("--max-failed-fraction 2", "--max-failed-fraction must be from 0 to 1"),
        (
            "--model demo --device cpu --temperature 0.5",
            "--temperature must be left at 1.0 without --do-sample",
        ),
        ("--min-actors 3 --max-actors 2", "--max-actors must be at least --min-actors"),
        ("--image-cpu-s 0", "--image-cpu-s must be"),
        ("--keep sha256", "sha256"),
        ("--keep caption", "caption"),
        ("--prompt x --prompt-column y", "prompt"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(arguments, said, capsys, tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    assert run_command(f"caption --input {tmp_path} --output b {arguments}") == 3
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--num-beams 0", "--num-beams must be at least 1, got 0"),
        ("--model demo --device-map auto --compile true", "--device-map"),
        ("--timeout-s 0", "--timeout-s must be above 0"),
        ("--max-in-flight 1001", "--max-in-flight must be from 1 to 1000, got 1001"),
        ("--decode-children 0", "--decode-children must be at least 1"),
        ("--port 70000", "--port must be from 1 to 65535, got 70000"),
    ],
)
def test_settings_of_the_endpoint_that_cannot_work_are_refused(arguments, said, capsys):
    assert run_command(f"serve {arguments}") == 3
    assert said in capsys.readouterr().err


def test_help_takes_little_time():
    """CPU seconds from the start of Python: 0.1 for Python alone, 0.4 if all settings are imported."""
    code = (
        "import sys, time\n"
        "from pipeline.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(time.process_time(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "blip2 caption photos -o captions" in done.stdout
    assert float(done.stderr) < 0.35


def test_version_names_what_decides_results_without_importing_ray():
    said = set()
    for module in ("pipeline", "deploy"):
        code = (
            "import sys\n"
            "sys.argv = ['x', '--version']\n"
            f"from {module}.__main__ import main\n"
            "try: main()\n"
            "except SystemExit as end: assert end.code == 0\n"
            "assert 'ray' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.add(done.stdout)
    [lines] = [text.splitlines() for text in said]
    assert [line.partition(" ")[0] for line in lines] == [
        "blip2-ray",
        "Python",
        "torch",
        "transformers",
        "ray",
        "device",
    ]
    assert all(line.partition(" ")[2] for line in lines)


if __name__ == "__main__":
    FROZEN.write_text("".join(line + "\n" for line in surface()))
