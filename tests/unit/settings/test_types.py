"""Settings made in Python are checked like those of a command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.command_table import COMMANDS, SUBMIT
from pipeline.inputs.reader import ReadOptions
from pipeline.maintenance.settings import CleanSettings
from pipeline.settings.job_settings import CaptionSettings
from pipeline.settings.outputs import Outputs
from pipeline.settings.placement import Placement
from pipeline.settings.report_settings import ExportSettings

JOB: dict[str, Any] = {"input": ("in",), "output": "out"}


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (CaptionSettings, JOB | {"format": "tar"}, "format must be 'auto', .*, got 'tar'"),
        (CaptionSettings, JOB | {"input": "photos"}, "input must be texts, got 'photos'"),
        (CaptionSettings, JOB | {"limit": "5"}, "limit must be a whole number or None, got '5'"),
        (CaptionSettings, JOB | {"fork": "no"}, "fork must be true or false, got 'no'"),
        (ReadOptions, {"image_encoding": "hex"}, "image_encoding must be 'auto' or 'base64', got 'hex'"),
        (ReadOptions, {"keep": "alt"}, "keep must be texts, got 'alt'"),
        (Outputs, {"score": ("a=b",), "score_model": "m", "score_kind": "x"}, "score_kind must be 'itm'"),
        (Placement, {"min_actors": 1.5}, "min_actors must be a whole number, got 1.5"),
        (ExportSettings, {"output": "o", "to": "xml", "into": "d"}, "to must be 'csv', .*, got 'xml'"),
        (CleanSettings, {"output": "o", "yes": "no"}, "yes must be true or false, got 'no'"),
    ],
)
def test_a_value_of_another_type_is_refused_at_once(cls: Any, values: dict[str, Any], message: str) -> None:
    """A text used to become a list of letters, "no" meant yes, and a wrong word was a worker's KeyError."""
    with pytest.raises(ValueError, match=f"^{message}"):
        cls(**values)


def test_lists_and_paths_are_taken_as_tuples_and_texts() -> None:
    settings = CaptionSettings(input=[Path("a"), "b"], output=Path("out"), include=["*.jpg"])  # type: ignore[arg-type]
    assert (settings.input, settings.output, settings.include) == (("a", "b"), "out", ("*.jpg",))


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {SUBMIT}))
def test_every_command_checks_the_types_of_its_settings(command: str) -> None:
    cls: Any = COMMANDS[command].settings
    fields = dataclasses.fields(cls)
    needed: dict[str, Any] = {
        f.name: "csv" if f.name == "to" else "x" for f in fields if f.default is dataclasses.MISSING
    }
    needed |= {"input": ("x",)} if "input" in {f.name for f in fields} else {}
    for field in fields:
        with pytest.raises(ValueError, match=f"^{field.name} must be "):
            cls(**(needed | {field.name: object()}))
