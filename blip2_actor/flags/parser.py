"""argparse with a command line for people: values without their flag, plain messages, and short help."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from blip2_actor.flags.config_file import as_words, read_parts
from blip2_actor.flags.suggestions import advice_for
from blip2_actor.flags.uris import hide_secrets
from blip2_actor.flags.values import Switch
from blip2_actor.flags.wrapping import wrap, wrap_for

WRONG_FLAGS = 3
"""Exit status of a command line that cannot be understood; `pipeline.exit_status` has the whole table."""

COMMAND_LINE = "command line"
"""Where a value comes from that is in no file."""

_OUR_WORDS = {
    r"^argument (?:-\w/)?(--[\w-]+)\S*: (must be|needs|takes)": r"\1 \2",
    r"^argument (?:-\w/)?(--[\w-]+)\S*: expected one argument$": r"\1 needs a value",
    r"^argument (?:-\w/)?(--[\w-]+)\S*: expected at least one argument$": r"\1 needs at least one value",
    r"^argument (?:-\w/)?(--[\w-]+)\S*: ignored explicit argument (.*)$": r"\1 takes no value, got \2",
}
"""Messages of argparse, as patterns, and ours for them."""

_NOT_IN_FILES = frozenset({"help", "help_all", "config", "verbose", "quiet", "json_lines", "version"})
"""What a configuration file cannot hold."""
_LONG_HELP = 12
"""Help with more flags than this shows the frequent ones, and --help-all shows the rest."""


class Parser(argparse.ArgumentParser):
    """Parse flags, and exit with `WRONG_FLAGS` and one sentence when they are wrong.

    Args:
        parts: parts of a configuration file that apply, and --config with them; a later one overrules.
        requires: refuse a command line that lacks a required flag.
        frequent: fields whose flags short help shows, next to those that are required.
        examples: command lines for help, each with what it does.
    """

    def __init__(
        self,
        *,
        parts: Sequence[str] = (),
        requires: bool = True,
        frequent: Iterable[str] = (),
        examples: Sequence[tuple[str, str]] = (),
        **settings: Any,
    ) -> None:
        super().__init__(allow_abbrev=False, add_help=False, **settings)
        self.positionals: list[argparse.Action] = []
        """Flags whose values may stand without them, in this order; only the last takes many."""
        self._parts = parts
        self._requires = requires
        self._frequent = frozenset(frequent)
        self._examples = examples
        self._required: list[argparse.Action] = []  # what argparse takes for optional while it parses
        self._file = ""  # the configuration file that is being read
        self.add_argument("-h", "--help", action=_Help, help="Show this help and exit.")
        if parts:
            self.add_argument("--help-all", action=_Help, help="Show help with all flags and exit.")
            self.add_argument(
                "--config",
                metavar="FILE",
                default=argparse.SUPPRESS,
                help=f"TOML file with flags in its part [{parts[-1]}]; the command line overrules it.",
            )

    def error(self, message: str) -> NoReturn:
        for pattern, ours in _OUR_WORDS.items():
            message = re.sub(pattern, ours, message)
        message = hide_secrets(message)  # A URI with a password may stand where it is refused.
        sentence = wrap_for(sys.stderr, f"{self.prog}: {self._file}{message}")
        self.exit(WRONG_FLAGS, f"{sentence}\nSee {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all arguments; report an unknown flag before a missing one.

        With parts of a configuration file, the result also has this parser as `parser`, and as `sources`
        where each value comes from: the command line, or the name of the file. `missing` has the required
        flags that are not given.
        """
        words = list(sys.argv[1:] if args is None else args)
        given, unknown = self._parse(words, namespace)
        for word in unknown:
            if word.startswith("-") and word != "-":
                self._refuse_unknown(word)
        self._take_positionals(given, unknown)
        if self._parts:
            self._add_file(given)
        missing = [action for action in self._required if getattr(given, action.dest, None) is None]
        if self._parts:
            given.missing = [_name_of(action) for action in missing]
        if missing and self._requires:
            self._refuse_missing(missing, given)
        return given, []

    def format_help(self, everything: bool = False) -> str:
        """Return help: all of it when it is short or wanted, else the frequent flags."""
        optional = [action for action in self._actions if action.option_strings and not action.required]
        is_long = len(optional) > _LONG_HELP
        formatter = self._get_formatter()
        formatter.add_usage(self._usage(), self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for group in self._action_groups:
            shown = [a for a in group._group_actions if everything or not is_long or self._is_frequent(a)]
            formatter.start_section(group.title if everything or not is_long else None)
            formatter.add_arguments(shown)
            formatter.end_section()
        if self._examples:
            lines = [f"  {line}\n      {meaning}" for line, meaning in self._examples]
            formatter.add_text("\n".join(["examples:", *lines]))
        if is_long and not everything:
            formatter.add_text(f"{self.prog} --help-all shows all {len(optional)} optional flags.")
        return formatter.format_help()

    def _get_formatter(self) -> _Formatter:
        return _Formatter(self.prog, self.positionals)

    def _parse(self, words: list[str], namespace: Any) -> tuple[argparse.Namespace, list[str]]:
        """Return the values of flags, and the words that are no flags and no values of flags."""
        after: list[str] = []
        if self.positionals and "--" in words:
            words, after = words[: words.index("--")], words[words.index("--") + 1 :]
        for word in words:
            if (
                re.match(r"-[a-z][\w-]+(=|$)", word)
                and f"-{word.partition('=')[0]}" in self._option_string_actions
            ):
                self._refuse_unknown(word)  # -output is not -o utput
        self._required = [action for action in self._actions if action.required]
        self._set_required(False)
        try:
            given, unknown = super().parse_known_args(words, namespace)
        finally:
            self._set_required(True)
        return given, [*unknown, *("./" + word if word.startswith("-") else word for word in after)]

    def _take_positionals(self, given: argparse.Namespace, words: list[str]) -> None:
        """Give words without a flag to the flags that may be left out."""
        for action in self.positionals:
            taken = words if action.nargs == "+" else words[:1]
            if not taken:
                return
            if hasattr(given, action.dest):
                flag = _name_of(action)
                self.error(
                    f"{flag} must be given once, got {_shown(getattr(given, action.dest))} and "
                    f"{_shown(taken)}; put a value with spaces between quotes"
                )
            setattr(given, action.dest, list(taken) if action.nargs == "+" else taken[0])
            words = words[len(taken) :]
        if words:
            flag = f"--{words[0].replace('_', '-')}"
            remedy = (
                f"did you mean {flag}?"
                if flag in self._option_string_actions
                else "put a value with spaces between quotes"
            )
            self.error(f"there is no argument {words[0]}; {remedy}")

    def _add_file(self, given: argparse.Namespace) -> None:
        """Add what the configuration file gives and the command line does not."""
        given.sources = dict.fromkeys(vars(given), COMMAND_LINE)
        given.parser = self
        path = getattr(given, "config", None)
        for name, value in (self._read_file(Path(path)) if path else {}).items():
            if name not in given:
                setattr(given, name, value)
                given.sources[name] = path

    def _read_file(self, path: Path) -> dict[str, Any]:
        """Return what a configuration file gives, by the names of fields."""
        words: list[str] = []
        try:
            values = read_parts(path, self._parts)
        except ValueError as error:
            self.error(str(error))
        self._file = f"{path}: "
        for key, value in values.items():
            action = self._option_string_actions.get(f"--{key}")
            if action is None or action.dest in _NOT_IN_FILES or f"--{key}" not in flag_names(action):
                self._refuse_unknown(f"--{key}", without=_NOT_IN_FILES)
            if isinstance(value, list) and action.nargs != "+":
                self.error(f"--{key} must be one value, got a list of {len(value)}")
            try:
                words += as_words(f"--{key}", value, isinstance(action, Switch))
            except ValueError as error:
                self.error(str(error))
        given, _ = self._parse(words, None)
        self._file = ""
        return vars(given)

    def _set_required(self, required: bool) -> None:
        for action in self._required:
            action.required = required

    def _refuse_unknown(self, argument: str, without: frozenset[str] = frozenset()) -> NoReturn:
        """Exit with the flag that is nearest to an unknown argument."""
        flag = argument.partition("=")[0]
        known = [name for one in self._actions if one.dest not in without for name in flag_names(one)]
        self.error(f"there is no flag {flag}{advice_for(flag, known)}")

    def _refuse_missing(self, missing: list[argparse.Action], given: argparse.Namespace) -> NoReturn:
        message = f"{' and '.join(map(_name_of, missing))} must be given"
        takers = [
            _name_of(action)
            for action in self._actions
            if action.nargs == "+" and len(getattr(given, action.dest, None) or ()) > 1
        ]
        if takers and set(missing) & set(self.positionals):
            message += f"; all words after {takers[0]} are values of it, so put it behind the others"
        self.error(message)

    def _usage(self) -> str | None:
        """Return the usage without its optional flags; None leaves it to argparse."""
        if not self._parts:
            return None
        required = [action for action in self._actions if action.required and action not in self.positionals]
        names = [_usage_of(action) for action in self.positionals if action.required]
        names += [f"{_first_name(action)} {action.metavar}" for action in required]
        return " ".join([self.prog, *names, "[FLAGS]"])

    def _is_frequent(self, action: argparse.Action) -> bool:
        always = {"help", "help_all", "config"}
        return not action.option_strings or action.required or action.dest in self._frequent | always


class _Help(argparse.Action):
    """Print help, short or whole, in the middle of parsing."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(nargs=0, default=argparse.SUPPRESS, **settings)

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> NoReturn:
        parser._set_required(True)  # help still shows what is required
        sys.stdout.write(parser.format_help(everything=option_string == "--help-all"))
        sys.stdout.flush()
        raise SystemExit(0)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows a flag by its short and its present name, without former names and opposites."""

    def __init__(self, prog: str, positionals: Sequence[argparse.Action]) -> None:
        super().__init__(prog, max_help_position=30)
        self._positionals = positionals

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return wrap(super()._fill_text(text, width, indent), width)  # examples keep their lines

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)  # --do-sample is one word

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if not name.startswith("--")] + [_name_of(action)]
        if isinstance(action, Switch) and action.shows_opposite:
            names.append(f"--no-{_name_of(action)[2:]}")
        flag = ", ".join(names)
        if action in self._positionals:
            flag = f"[{flag}]"  # it may be left out
        return flag if action.nargs == 0 else f"{flag} {self._format_args(action, str(action.metavar))}"


def flag_names(action: argparse.Action) -> Sequence[str]:
    """Return the names of a flag, without its opposites."""
    return action.positive if isinstance(action, Switch) else action.option_strings


def _name_of(action: argparse.Action) -> str:
    """Return the long name of a flag, or the name of an argument."""
    long = [name for name in action.option_strings if name.startswith("--")]
    return next(iter(long or action.option_strings), str(action.metavar))


def _first_name(action: argparse.Action) -> str:
    return (action.option_strings or [str(action.metavar)])[0]


def _usage_of(action: argparse.Action) -> str:
    return f"{action.metavar} [{action.metavar} ...]" if action.nargs == "+" else str(action.metavar)


def _shown(value: str | list[str]) -> str:
    return value if isinstance(value, str) else " ".join(value)
