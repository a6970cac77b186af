"""Command-line flags from frozen dataclasses: a field is a flag, the docstring under it is its help.

Every default exists once, in the dataclass. A field whose type is a dataclass adds the flags of that
dataclass to the same flat list. `blip2` and `python -m deploy` both take their flags from here, and read
configuration files with the same names, types and messages.

A wrong command line exits with `WRONG_FLAGS` before anything is started. An unknown flag is reported with the
nearest known one, and before a missing flag: the misspelled flag usually is the missing one. In a terminal
messages break at words, and never inside a command.
"""

from __future__ import annotations

from blip2_actor.flags.effective import (
    effective_settings,
    settings_as_json,
    settings_as_toml,
    settings_as_words,
)
from blip2_actor.flags.fields import (
    add_flags,
    build,
    field_docs,
    former_names,
    formerly,
    hiding,
    positional,
    prefixed,
    with_current_names,
    with_flags,
    without_flag,
    written_as,
)
from blip2_actor.flags.parser import WRONG_FLAGS, Parser, flag_names
from blip2_actor.flags.suggestions import did_you_mean
from blip2_actor.flags.uris import hide_secrets, split_uri
from blip2_actor.flags.wrapping import wrap_for

__all__ = [
    "WRONG_FLAGS",
    "Parser",
    "add_flags",
    "build",
    "did_you_mean",
    "effective_settings",
    "field_docs",
    "flag_names",
    "former_names",
    "formerly",
    "hide_secrets",
    "hiding",
    "positional",
    "prefixed",
    "settings_as_json",
    "settings_as_toml",
    "settings_as_words",
    "split_uri",
    "with_current_names",
    "with_flags",
    "without_flag",
    "wrap_for",
    "written_as",
]
