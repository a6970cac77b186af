"""The commands and code of the README and of the user pages, run unchanged."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from PIL import Image

from blip2_actor.demo.scenes import SceneSampler, draw
from blip2_actor.testing import save_tiny_retrieval_checkpoint
from pipeline.cli.main import main, make_parser
from pipeline.submit.settings import split_arguments
from tests.documents import ANYWHERE, ROOT, blocks


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a picture in it."""
    scenes = SceneSampler("held_out", 0).sample(1)
    Image.fromarray(np.asarray(draw(scenes, 96)[0])).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_is_one_that_the_command_line_takes(folder: Path) -> None:
    """A renamed flag must not live on in a page."""
    (configuration,) = blocks("toml")
    (folder / "blip2.toml").write_text(configuration.text)
    parser = make_parser()
    seen = 0
    for block in blocks("sh"):
        for words in block.commands:
            if words[:2] == ["blip2", "submit"]:
                words = ["blip2", *split_arguments(words[1:])[1]]
            if words[0] == "blip2" and words[1] not in ("serve", "config", "completion"):
                parser.parse_args(words[1 : words.index("|") if "|" in words else None])
                seen += 1
            if words[0] == "make":
                does = subprocess.run(
                    ["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True, text=True
                ).stdout
                assert "awk" not in does, f"{shlex.join(words)} only prints the list of targets"
    assert seen >= 40


@pytest.mark.slow
def test_the_hub_has_the_commands_that_upload_results() -> None:
    """Version 2 of the hub's client has renamed a command that guides still mention."""
    commands = [words for block in blocks("sh") for words in block.commands if words[0] == "hf"]
    assert commands
    for words in commands:
        program = Path(sys.executable).with_name("hf")
        shown = subprocess.run(
            [program, words[1], "--help"], capture_output=True, text=True, check=True
        ).stdout
        assert all(flag in shown for flag in words if flag.startswith("--"))


def test_the_runnable_commands_run(local_ray: None, folder: Path) -> None:
    """The README's commands, then those of the pages that read the output of these."""
    (block,) = blocks("sh", where=ANYWHERE)
    after = blocks("sh", where="captions")
    assert block.page == "README.md" and {one.page for one in after} == {"docs/results.md"}
    for words in [words for one in (block, *after) for words in one.commands]:
        assert words[0] == "blip2"
        assert main(words[1:]) == 0, shlex.join(words)
    assert list((folder / "captions").rglob("*.parquet"))
    for one in blocks("python", where="captions"):
        names: dict[str, Any] = {}
        exec(compile(one.text, one.page, "exec"), names)
        assert len(names["table"]) == 40 and names["captions"].num_rows == 40
    for one in blocks("sql", where="captions"):
        assert len(duckdb.execute(one.text).fetchall()) == 39


def test_the_configuration_file_gives_the_settings_that_its_page_shows(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = ("docs/command_line.md",)
    (file,), (shown,) = blocks("toml", pages), blocks("text", pages)
    (command,) = [words for block in blocks("sh", pages) for words in block.commands if words[1] == "config"]
    (folder / "blip2.toml").write_text(file.text)
    assert main(command[1:]) == 0
    printed = capsys.readouterr().out
    begins, rest = shown.text.split("…\n")
    assert printed.startswith(begins) and rest in printed
    assert tomllib.loads(printed)["caption"]["num-beams"] == 5


@pytest.mark.slow
def test_the_python_blocks_run(local_ray: None, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The blocks of a page run in order and share names; a random model replaces those of the hub."""
    tiny = str(save_tiny_retrieval_checkpoint(folder / "retrieval"))
    names: dict[str, dict[str, object]] = {}
    runnable = blocks("python", where=ANYWHERE)
    assert len(runnable) == 4
    capsys.readouterr()
    for block in runnable:
        code = block.text.replace("Salesforce/blip2-itm-vit-g", tiny)
        exec(compile(code, block.page, "exec"), names.setdefault(block.page, {}))
    *_, readme_line, engine_line, continued, match, stage_line = capsys.readouterr().out.strip().splitlines()
    assert readme_line == engine_line and engine_line.endswith(" ok")
    assert " (-" in continued, "the log-probability of each token"
    assert all(-1 <= float(score) <= 1 for score in match.split())
    caption = stage_line.removesuffix(" camera 1")
    assert caption in engine_line, "the engine alone and the stage must say the same of one picture"
