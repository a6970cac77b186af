"""The command line `blip2`: subcommands from dataclasses.

Printing help imports neither torch, Ray, pyarrow nor numpy, and only the settings of the command that is
asked for. A command first says what is not installed, then which settings contradict each other, and only
then imports what it needs. `pipeline.exit_status` has the exit statuses.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from blip2_actor.flags import (
    WRONG_FLAGS,
    Parser,
    add_flags,
    build,
    did_you_mean,
    effective_settings,
    settings_as_words,
    wrap_for,
)
from blip2_actor.installation import MissingPackages, require_packages
from blip2_actor.version_flag import add_version_flag
from pipeline.cli.command_table import (
    COMMANDS,
    COMPLETION,
    CONFIG,
    FREQUENT,
    HABITS,
    OTHERS,
    SERVE,
    SUBMIT,
    Command,
)
from pipeline.cli.log_level import LEVELS, print_log
from pipeline.cli.serve import become_deployment
from pipeline.storage.secrets import hide_secrets

EXAMPLES = (
    ("blip2 demo", "try it on drawn scenes, without a download"),
    ("blip2 caption photos -o captions", "caption a folder of images"),
    ("blip2 show captions", "look at the captions"),
)

OUTPUT_LOST = 1
"""`ExitStatus.FAILED`, whose module need not be imported for a page of help."""
STYLE_FLAGS = {"verbose": "--verbose", "quiet": "--quiet", "json_lines": "--json"}
"""Switches of the parser that are no settings, by the names under which it keeps them."""


def make_parser(only: str | None = None, requires: bool = True) -> Parser:
    """Return the parser of the whole command line.

    Args:
        only: the one command that gets its flags, so that other settings are not imported; None gives all.
        requires: refuse a command line that lacks a required flag.
    """
    parser = Parser(
        prog="blip2",
        usage="blip2 COMMAND [FLAGS]",
        description="BLIP-2 captions for millions of images, on Ray.",
        examples=EXAMPLES,
    )
    add_version_flag(parser)
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, prog="blip2", title="commands"
    )
    for name, command in COMMANDS.items():
        if only in (None, name):
            sub = commands.add_parser(
                name,
                help=command.summary,
                description=command.settings.__doc__,
                parts=command.parts(name),
                requires=requires,
                frequent=FREQUENT,
                examples=command.examples,
            )
            sub.add_argument(
                "-v",
                "--verbose",
                action="store_true",
                help="Also print log messages, and the traceback of an error.",
            )
            sub.add_argument(
                "-q", "--quiet", action="store_true", help="Print results, warnings and errors only."
            )
            if command.starts_ray and "ray" in command.needs:
                sub.add_argument(
                    "--log-level",
                    choices=LEVELS,
                    help="Print log messages of this level and above, and let the workers write them as JSON "
                    "to Ray's session folder.",
                )
            if "json" not in {field.name for field in dataclasses.fields(command.settings)}:
                sub.add_argument(
                    "--json", dest="json_lines", action="store_true", help="Print one JSON object per line."
                )
            add_flags(sub, command.settings, command.without)
        else:
            commands.add_parser(name, help=command.summary)
    for name, summary in OTHERS.items():
        commands.add_parser(name, help=summary)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in ([], ["help"]):  # a habit
        arguments = [*arguments[1:], "--help"]
    if arguments == ["version"]:
        arguments = ["--version"]
    try:
        return _run(arguments)
    except MissingPackages as error:
        sys.stderr.write(wrap_for(sys.stderr, str(error)) + "\n")
        return WRONG_FLAGS
    except ValueError as error:
        sys.stderr.write(wrap_for(sys.stderr, hide_secrets(f"blip2 {arguments[0]}: {error}")) + "\n")
        return WRONG_FLAGS
    except BrokenPipeError:  # the reader has what it wanted
        return 0
    except OSError as error:  # commands catch those of their files
        if error.errno is None or error.filename is not None:  # of a library that cannot be loaded, or a file
            raise
        sys.stderr.write(f"blip2: standard output cannot be written: {error.strerror}\n")
        return OUTPUT_LOST


def _run(arguments: list[str]) -> int:
    if arguments[:1] == [SERVE]:
        become_deployment(arguments[1:])
    if arguments[:1] == [CONFIG]:
        from pipeline.cli.configuration import print_settings

        return _written(print_settings(arguments[1:], parse))
    if arguments[:1] == [COMPLETION]:
        from pipeline.cli.completion import print_script

        return _written(print_script(arguments[1:], make_parser))
    job: list[str] = []
    if arguments[:1] == [SUBMIT]:
        from pipeline.submit.settings import split_arguments

        arguments, job = split_arguments(arguments)
    command, given = parse(arguments)
    settings = _build(given, read_job(job))
    _choose_style(given)
    level = getattr(given, "log_level", None)
    if given.verbose:
        print_log("debug")
    elif level is not None:
        print_log(level)
    if command.starts_ray:
        from pipeline.run.cluster import choose_log_level, set_ray_environment

        set_ray_environment()
        if level is not None:
            choose_log_level(level)
    status = command.load()(settings)
    is_kept = COMMANDS[job[0]].is_job and not settings.no_wait if job else command.is_job
    return status if is_kept else _written(status)


def _written(status: int) -> int:
    """Return the exit status of a command whose result is what it prints; raise OSError if that is lost."""
    from pipeline.progress import lost_output

    error = lost_output()
    if error is not None:
        raise error
    return status


def _choose_style(given: argparse.Namespace) -> None:
    """Let the consoles of this process speak as the flags ask for it.

    A command with a setting `json` prints one document by itself.
    """
    from pipeline.progress import choose_style

    is_json = getattr(given, "json_lines", False)
    is_logged = given.verbose or getattr(given, "log_level", None) is not None
    if is_json and given.quiet:
        raise ValueError("--quiet must be given without --json, got both; leave one of them out")
    choose_style("json" if is_json else "quiet" if given.quiet else "text", may_be_live=not is_logged)


def parse(arguments: Sequence[str], requires: bool = True) -> tuple[Command, argparse.Namespace]:
    """Return the command of a command line, and what its flags and its configuration file give."""
    words = list(arguments)
    if " ".join(words[:2]) in COMMANDS:  # a command of two words
        words[:2] = [" ".join(words[:2])]
    name = words[0] if words and not words[0].startswith("-") else ""
    parser = make_parser(name, requires)
    if name and name not in COMMANDS:
        parser.error(f"there is no command {name}{_advice(name)}")
    given = parser.parse_args(words)
    return COMMANDS[given.command], given


def _advice(word: str) -> str:
    """Return the end of a sentence that says which command is meant."""
    if word in HABITS:
        return f"; did you mean {HABITS[word]}?"
    if os.path.exists(word):
        return f"; did you mean blip2 caption {word} -o OUTPUT?"
    return did_you_mean(word, [name for name in [*COMMANDS, *OTHERS] if " " not in name])


def _build(given: argparse.Namespace, more: Mapping[str, Any]) -> Any:
    """Return the settings of a command.

    Args:
        more: settings that no flag has.

    Raises:
        MissingPackages: what the command needs is not installed.
        ValueError: settings contradict each other.
    """
    command = COMMANDS[given.command]
    require_packages(f"blip2 {given.command}", command.needs, "batch")
    return build(command.settings, {**vars(given), **more})


def read_job(arguments: Sequence[str]) -> dict[str, Any]:
    """Check the settings of a job; return those of `blip2 submit` that say what the job is.

    Raises:
        ValueError: settings of the job contradict each other.
    """
    if not arguments:
        return {}
    command, given = parse(arguments)
    words = list(arguments)
    if "config" in given:  # the file is not on the cluster
        words = [*given.command.split(), *settings_as_words(effective_settings(given, command.settings))]
        words += ["--log-level", given.log_level] if given.log_level else []
        words += [flag for name, flag in STYLE_FLAGS.items() if getattr(given, name, False)]
    _build(given, {})
    return {"job": words, "job_flags": vars(given), "job_settings": command.settings}
