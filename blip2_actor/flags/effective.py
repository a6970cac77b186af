"""What a command line and its file come to: every setting, its value, and where it comes from."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from blip2_actor.flags.config_file import as_words
from blip2_actor.flags.fields import default_of, flag_fields, flag_of
from blip2_actor.flags.values import Switch

DEFAULT = "default"


@dataclass(frozen=True)
class EffectiveSetting:
    """The value of one flag."""

    flag: str
    value: Any
    """None if it is not given and has no default."""
    source: str
    """command line, the name of a configuration file, or default."""
    is_switch: bool


def effective_settings(given: argparse.Namespace, cls: type) -> list[EffectiveSetting]:
    """Return the value of every flag of a dataclass.

    Args:
        given: what `Parser.parse_args` has returned, for a parser with parts of a configuration file.
    """
    actions = {action.dest: action for action in given.parser._actions}
    settings = []
    for name, field in flag_fields(cls):
        if name in actions:  # otherwise it has no effect in this command
            value = getattr(given, name, default_of(field))
            source = given.sources.get(name, DEFAULT)
            is_switch = isinstance(actions[name], Switch)
            settings.append(EffectiveSetting(flag_of(name), value, source, is_switch))
    return settings


def settings_as_words(settings: Iterable[EffectiveSetting]) -> list[str]:
    """Return the flags that give the same settings without a configuration file."""
    words: list[str] = []
    for setting in settings:
        if setting.source != DEFAULT:
            words += as_words(setting.flag, setting.value, setting.is_switch)
    return words


def settings_as_toml(part: str, settings: Iterable[EffectiveSetting]) -> Iterator[str]:
    """Yield the lines of a configuration file with the same meaning; defaults are comments.

    Raises:
        ValueError: a value is not UTF-8, and TOML has no escape for such bytes.
    """
    yield f"[{part}]" if part.isalnum() else f"[{_toml(part)}]"
    for setting in settings:
        key = setting.flag.removeprefix("--")
        if any("\ud800" <= character <= "\udfff" for character in _toml(setting.value)):
            raise ValueError(f"{setting.flag} must be UTF-8 in TOML, got {setting.value!r}; use --json")
        if setting.value is None:
            yield f"# {key} is not set"
        elif setting.source == DEFAULT:
            yield f"# {key} = {_toml(setting.value)}"
        else:
            yield f"{key} = {_toml(setting.value)}  # {setting.source}"


def settings_as_json(part: str, settings: Iterable[EffectiveSetting]) -> str:
    """Return one JSON object with the flag, the value and the source of each setting."""
    rows = [{"flag": one.flag, "value": _json_value(one.value), "from": one.source} for one in settings]
    return json.dumps({"command": part, "settings": rows}, ensure_ascii=False)


def _json_value(value: Any) -> Any:
    """Return a value that JSON has; it has no number that is not finite."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value) if isinstance(value, float) else json.dumps(value)  # inf, where json has Infinity
