"""The commands and the code of the README and of the pages for users, run as they stand there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip2_actor.demo.scenes import SceneSampler, draw
from pipeline.cli.main import main, make_parser

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/batch_job.md", "docs/results.md", "docs/python.md", "docs/tutorial.md")
BLOCK = re.compile(r"(?P<run><!-- run -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block; `runs` if the README marks it as runnable anywhere."""

    language: str
    text: str
    runs: bool

    @property
    def commands(self) -> list[list[str]]:
        return [words for line in self.text.splitlines() if (words := shlex.split(line, comments=True))]


def blocks(language: str, pages: tuple[str, ...] = PAGES) -> list[Block]:
    text = "\n".join((ROOT / page).read_text() for page in pages)
    found = (Block(m["language"], m["text"], bool(m["run"])) for m in BLOCK.finditer(text))
    return [block for block in found if block.language == language]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a picture in it."""
    scenes = SceneSampler("held_out", 0).sample(1)
    Image.fromarray(np.asarray(draw(scenes, 96)[0])).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_is_one_that_the_command_line_takes() -> None:
    """A renamed flag must not live on in a page."""
    seen = 0
    for block in blocks("sh"):
        for words in block.commands:
            if words[:2] == ["blip2", "submit"]:
                words = ["blip2", *words[words.index("caption") :]]
            if words[0] == "blip2" and words[1] != "serve":
                make_parser().parse_args(words[1 : words.index("|") if "|" in words else None])
                seen += 1
            if words[0] == "make":
                does = subprocess.run(
                    ["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True, text=True
                ).stdout
                assert "awk" not in does, f"{shlex.join(words)} only prints the list of targets"
    assert seen >= 7


@pytest.mark.slow
def test_the_hub_has_the_commands_that_upload_results() -> None:
    """Version 2 of the hub's client has renamed one that guides still name."""
    commands = [words for block in blocks("sh") for words in block.commands if words[0] == "hf"]
    assert commands
    for words in commands:
        program = Path(sys.executable).with_name("hf")
        shown = subprocess.run(
            [program, words[1], "--help"], capture_output=True, text=True, check=True
        ).stdout
        assert all(flag in shown for flag in words if flag.startswith("--"))


def test_the_runnable_commands_run(local_ray: None, folder: Path) -> None:
    (block,) = [block for block in blocks("sh") if block.runs]
    for words in block.commands:
        assert words[0] == "blip2"
        assert main(words[1:]) == 0, shlex.join(words)
    assert list((folder / "captions").rglob("*.parquet"))


@pytest.mark.slow
def test_the_python_blocks_run(local_ray: None, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runnable = [block for block in blocks("python") if block.runs]
    assert len(runnable) == 3
    for block in runnable:
        exec(compile(block.text, "README.md", "exec"), {})
    readme_line, engine_line, continued, stage_line = capsys.readouterr().out.strip().splitlines()[-4:]
    assert readme_line == engine_line and engine_line.endswith(" ok")
    assert " (-" in continued, "the log-probability of each token"
    caption = stage_line.removesuffix(" camera 1")
    assert caption in engine_line, "the engine alone and the stage must say the same of one picture"
