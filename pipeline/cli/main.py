"""The command line `blip2`: subcommands from dataclasses.

Printing help imports neither torch, Ray, pyarrow nor numpy. A command first says what is not installed, then
which settings contradict each other, and only then imports what it needs. `pipeline.exit_status` has the exit
statuses.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from blip2_actor.flags import Parser, add_flags, build, did_you_mean
from blip2_actor.installation import MissingPackages, require_packages
from blip2_actor.version_flag import add_version_flag
from pipeline.cli.serve import become_deployment
from pipeline.exit_status import ExitStatus
from pipeline.maintenance.settings import CleanSettings, VerifySettings
from pipeline.settings.demo_settings import DemoSettings
from pipeline.settings.doctor_settings import DoctorSettings
from pipeline.settings.job_settings import CaptionSettings, EmbedSettings, ScoreSettings
from pipeline.settings.plan_settings import PlanEmbedSettings, PlanScoreSettings, PlanSettings
from pipeline.settings.report_settings import (
    CompareSettings,
    ExportSettings,
    ReportSettings,
    ShowSettings,
    StatusSettings,
)
from pipeline.settings.retry_settings import RetrySettings
from pipeline.submit.settings import SubmitSettings, split_arguments


@dataclass(frozen=True)
class Command:
    """A subcommand: its settings, and the function that takes them and returns the exit status."""

    settings: type
    function: str
    """module:function, imported when the command runs."""
    without: frozenset[str] = frozenset()
    """Settings that have no effect in this command and get no flags."""
    needs: tuple[str, ...] = ("ray", "pyarrow")
    """Packages of the extra `batch` without which the command cannot run."""
    starts_ray: bool = True
    """False if it only asks a cluster that exists, with the token that its user has."""

    @property
    def summary(self) -> str:
        return (self.settings.__doc__ or "").strip()

    def load(self) -> Callable[[Any], int]:
        module, _, name = self.function.partition(":")
        return getattr(import_module(module), name)


SUBMIT = "submit"
JOB = frozenset({"job", "job_settings"})
"""What `blip2 submit` takes from the rest of its command line."""
ONLY_FOR_RUNS = frozenset({"fork", "add_new", "redo_changed", "slice"})
NO_RAY = ("pyarrow",)
COMMANDS = {
    "demo": Command(DemoSettings, "pipeline.demo.demo:demo"),
    "caption": Command(CaptionSettings, "pipeline.cli.commands:caption"),
    "embed": Command(EmbedSettings, "pipeline.cli.commands:embed"),
    "score": Command(ScoreSettings, "pipeline.cli.commands:score"),
    "plan": Command(PlanSettings, "pipeline.plan.plan:plan", ONLY_FOR_RUNS),
    "plan embed": Command(PlanEmbedSettings, "pipeline.plan.plan:plan", ONLY_FOR_RUNS),
    "plan score": Command(PlanScoreSettings, "pipeline.plan.plan:plan", ONLY_FOR_RUNS),
    "report": Command(ReportSettings, "pipeline.report.report:report", needs=NO_RAY),
    "compare": Command(CompareSettings, "pipeline.compare.command:command", needs=NO_RAY),
    "doctor": Command(DoctorSettings, "pipeline.doctor.doctor:doctor", needs=NO_RAY),
    "export": Command(ExportSettings, "pipeline.export.export:export", needs=NO_RAY),
    "show": Command(ShowSettings, "pipeline.show.show:show", needs=("pyarrow", "rich")),
    "status": Command(StatusSettings, "pipeline.cli.status:status", needs=NO_RAY),
    "verify": Command(VerifySettings, "pipeline.maintenance.verify:verify", needs=NO_RAY),
    "clean": Command(CleanSettings, "pipeline.maintenance.clean:clean", needs=NO_RAY),
    "retry": Command(RetrySettings, "pipeline.cli.commands:retry"),
    SUBMIT: Command(SubmitSettings, "pipeline.submit.submit:submit", JOB, starts_ray=False),
}
SERVE = "serve"


def make_parser() -> Parser:
    parser = Parser(prog="blip2", description="BLIP-2 captions for millions of images, on Ray.")
    add_version_flag(parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.summary, description=command.summary)
        add_flags(sub, command.settings, command.without)
    commands.add_parser(SERVE, help="Serve captions over HTTP from this machine.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == [SERVE]:
        become_deployment(arguments[1:])
    if " ".join(arguments[:2]) in COMMANDS:  # a command of two words
        arguments[:2] = [" ".join(arguments[:2])]
    job: list[str] = []
    if arguments[:1] == [SUBMIT]:
        arguments, job = split_arguments(arguments)
    try:
        command, settings = _read(arguments, _read_job(job))
    except MissingPackages as error:
        print(error, file=sys.stderr)  # noqa: T201
        return ExitStatus.REFUSED
    except ValueError as error:
        print(f"blip2 {arguments[0]}: {error}", file=sys.stderr)  # noqa: T201
        return ExitStatus.REFUSED
    if command.starts_ray:
        from pipeline.run.cluster import set_ray_environment

        set_ray_environment()
    return command.load()(settings)


def _read(arguments: Sequence[str], more: Mapping[str, Any]) -> tuple[Command, Any]:
    """Return a command and its settings.

    Args:
        more: settings that no flag has.

    Raises:
        MissingPackages: what the command needs is not installed.
        ValueError: settings contradict each other.
    """
    parser = make_parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        parser.error(f"there is no command {arguments[0]}{did_you_mean(arguments[0], [*COMMANDS, SERVE])}")
    given = parser.parse_args(arguments)
    command = COMMANDS[given.command]
    require_packages(f"blip2 {given.command}", command.needs, "batch")
    return command, build(command.settings, {**vars(given), **more})


def _read_job(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the settings of `blip2 submit` that say what its job is."""
    return {"job": arguments, "job_settings": _read(arguments, {})[1]} if arguments else {}
