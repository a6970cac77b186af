"""`blip2 config COMMAND ...`: print what a command line comes to, as a configuration file or as JSON."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from blip2_actor.flags import Parser, build, effective_settings, settings_as_json, settings_as_toml
from pipeline.cli.command_table import COMMANDS, CONFIG, JOB, SERVE, Command
from pipeline.cli.serve import become_deployment
from pipeline.progress import write_json, write_toml

Parse = Callable[[Sequence[str], bool], tuple[Command, argparse.Namespace]]
JSON = "--json"


def print_settings(arguments: Sequence[str], parse: Parse) -> int:
    """Print the settings of a command line, and where each comes from.

    Args:
        arguments: --json if wanted, a command, and its flags.
        parse: parses a command line; False allows that required flags are missing.

    Raises:
        ValueError: settings contradict each other.
    """
    parser = Parser(
        prog=f"blip2 {CONFIG}",
        usage=f"blip2 {CONFIG} [{JSON}] COMMAND [FLAGS OF THE COMMAND]",
        description="Print the settings of a command line, and where each comes from: the command line, the "
        "file of --config, or the default. What is printed is a configuration file itself.",
        examples=[(f"blip2 {CONFIG} caption photos --config blip2.toml", "what caption would be given")],
    )
    parser.add_argument(JSON, action="store_true", help="Print one JSON object.")
    start = next((n for n, word in enumerate(arguments) if not word.startswith("-")), len(arguments))
    as_json: bool = parser.parse_args(arguments[:start]).json
    command_line = arguments[start:]
    if not command_line:
        parser.error(f"a COMMAND must be given, one of {', '.join([*COMMANDS, SERVE])}")
    if command_line[0] == SERVE:
        become_deployment([CONFIG, *arguments[:start], *command_line[1:]])
    command, given = parse(command_line, False)
    settings = effective_settings(given, command.settings)
    if not given.missing and not command.without & JOB:
        build(command.settings, vars(given))
    if as_json:
        write_json(settings_as_json(given.command, settings))
    else:  # not by `Console`, which wraps lines in a terminal: a file of them must be one of settings
        write_toml("\n".join(settings_as_toml(given.command, settings)))
    return 0
