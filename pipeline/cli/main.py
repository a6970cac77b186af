"""The command line `blip2`: subcommands from dataclasses. Neither torch nor Ray is imported to print help.

Exit status: 0 done; 2 when a larger share of the rows failed than allowed; 1 for anything else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn

from blip2_actor.flags import Parser, add_flags, build
from pipeline.run.cluster import set_ray_environment
from pipeline.settings.demo_settings import DemoSettings
from pipeline.settings.job_settings import CaptionSettings, EmbedSettings, ScoreSettings
from pipeline.settings.plan_settings import PlanEmbedSettings, PlanScoreSettings, PlanSettings
from pipeline.settings.report_settings import ReportSettings, StatusSettings
from pipeline.settings.retry_settings import RetrySettings


@dataclass(frozen=True)
class Command:
    """A subcommand: its settings, and the function that takes them and gives the exit status."""

    settings: type
    function: str
    """module:function, imported when the command runs."""
    without: frozenset[str] = frozenset()
    """Settings that mean nothing here and are no flags."""

    @property
    def summary(self) -> str:
        return (self.settings.__doc__ or "").strip()

    def load(self) -> Callable[[Any], int]:
        module, _, name = self.function.partition(":")
        return getattr(import_module(module), name)


COMMANDS = {
    "demo": Command(DemoSettings, "pipeline.demo.demo:demo"),
    "caption": Command(CaptionSettings, "pipeline.cli.commands:caption"),
    "embed": Command(EmbedSettings, "pipeline.cli.commands:embed"),
    "score": Command(ScoreSettings, "pipeline.cli.commands:score"),
    "plan": Command(PlanSettings, "pipeline.plan.plan:plan", without=frozenset({"fork"})),
    "plan embed": Command(PlanEmbedSettings, "pipeline.plan.plan:plan", without=frozenset({"fork"})),
    "plan score": Command(PlanScoreSettings, "pipeline.plan.plan:plan", without=frozenset({"fork"})),
    "report": Command(ReportSettings, "pipeline.report.report:report"),
    "status": Command(StatusSettings, "pipeline.cli.commands:status"),
    "retry": Command(RetrySettings, "pipeline.cli.commands:retry"),
}
SERVE = "serve"


def make_parser() -> Parser:
    parser = Parser(prog="blip2", description="BLIP-2 captions for millions of images, on Ray.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.summary, description=command.summary)
        add_flags(sub, command.settings, command.without)
    commands.add_parser(SERVE, help="Serve captions over HTTP; takes the flags of python -m deploy.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == [SERVE]:
        _become([sys.executable, "-m", "deploy", *arguments[1:]])
    if " ".join(arguments[:2]) in COMMANDS:  # of two words
        arguments[:2] = [" ".join(arguments[:2])]
    parser = make_parser()
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.refuse_unknown(unknown, given.command)
    command = COMMANDS[given.command]
    try:
        settings: Any = build(command.settings, vars(given))
    except ValueError as error:
        print(f"blip2 {given.command}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    set_ray_environment()
    return command.load()(settings)


def _become(command: list[str]) -> NoReturn:
    """Go on as another program: its signals and its exit status are its own."""
    os.execv(command[0], command)
