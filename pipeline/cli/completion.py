"""`blip2 completion SHELL`: print the script that completes commands, flags, choices and files in a shell."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from blip2_actor.flags import Parser, flag_names
from blip2_actor.installation import require_packages
from pipeline.cli.command_table import COMMANDS, COMPLETION, CONFIG, SERVE
from pipeline.cli.serve import deployment
from pipeline.progress import write

SHELLS = {
    "bash": "blip2 completion bash > ~/.local/share/bash-completion/completions/blip2",
    "zsh": "blip2 completion zsh > ~/.zfunc/_blip2",
    "fish": "blip2 completion fish > ~/.config/fish/completions/blip2.fish",
}
"""Shells, each with the command that installs the script."""
NO_FILES = frozenset({"model", "revision", "prompt", "grep", "ask", "stop", "device"})
"""Flags with a text that is no file, next to those whose value is a number or one of a list."""


def print_script(arguments: Sequence[str], make_parser: Callable[[], Parser]) -> int:
    """Print the completion script of a shell.

    Args:
        make_parser: makes the parser of all commands.
    """
    parser = Parser(
        prog=f"blip2 {COMPLETION}",
        usage=f"blip2 {COMPLETION} SHELL",
        description="Print the completion script of a shell. Write it into a folder that the shell "
        "reads, such as those below, and restart the shell.",
        examples=[(command, shell) for shell, command in SHELLS.items()],
    )
    parser.add_argument("shell", metavar="SHELL", help=" or ".join(SHELLS))
    shell: str = parser.parse_args(list(arguments)).shell
    if shell not in SHELLS:
        parser.error(f"SHELL must be {' or '.join(SHELLS)}, got {shell}")
    require_packages(f"blip2 {COMPLETION}", ("shtab",), "batch")
    import shtab

    write(sys.stdout, shtab.complete(_simplified(make_parser()), shell))
    return 0


def _simplified(parser: Parser) -> argparse.ArgumentParser:
    """Return a parser of plain argparse, as shtab reads it, with the flags of the endpoint too."""
    [commands] = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    plain = argparse.ArgumentParser(prog=parser.prog)
    plain_commands = plain.add_subparsers()
    for choice in commands._choices_actions:
        if " " not in choice.dest:  # shells complete one word at a time
            sub = plain_commands.add_parser(choice.dest, help=choice.help)
            _copy_flags(commands.choices[choice.dest], sub)
    for flag in _flags_of_serve():
        plain_commands.choices[SERVE].add_argument(flag)
    plain_commands.choices[COMPLETION].add_argument("shell", choices=list(SHELLS))
    plain_commands.choices[CONFIG].add_argument("of", choices=[*COMMANDS, SERVE])
    return plain


def _copy_flags(parser: Parser, plain: argparse.ArgumentParser) -> None:
    """Add the flags of a parser to a plain one, with their choices, and files where they may be named."""
    import shtab

    for action in parser._actions:
        if action.dest == "help":
            continue
        flags = flag_names(action)
        if action.nargs == 0:
            plain.add_argument(*flags, action="store_true", help=action.help)
            continue
        metavar = str(action.metavar)
        choices = metavar.strip("{}").split(",") if metavar.startswith("{") else None
        copy: Any = plain.add_argument(*flags, choices=choices, help=action.help)
        if choices is None and action.type in (str, None) and action.dest not in NO_FILES:
            copy.complete = shtab.FILE
    if parser.positionals:
        files: Any = plain.add_argument("files", nargs="*")
        files.complete = shtab.FILE


def _flags_of_serve() -> list[str]:
    """Return the flags of `blip2 serve`, which the endpoint knows."""
    command, environment = deployment([CONFIG, "--json"])
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return [setting["flag"] for setting in json.loads(done.stdout)["settings"]]
