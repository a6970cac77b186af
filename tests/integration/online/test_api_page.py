"""The code blocks of docs/api.md, run unchanged against the running endpoint."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

import pytest

from tests.documents import Block, blocks
from tests.integration.online.endpoint import png

IN_THE_PAGE = "http://127.0.0.1:8000"
NEEDS_ANOTHER_MODEL = "unsupported"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the pictures that the page mentions."""
    for seed, name in enumerate(("photo.jpg", "one.jpg", "two.jpg")):
        (tmp_path / name).write_bytes(png(seed))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def code_of(block: Block, url: str) -> str:
    picture = base64.b64encode(png(0)).decode()
    return block.text.replace(IN_THE_PAGE, url).replace("<base64>", picture)


def test_the_commands_get_answers(url: str, folder: Path) -> None:
    """This endpoint has no retrieval model, so it refuses requests that need one, as the page says."""
    answers = []
    for block in blocks("sh", where="endpoint"):
        script = code_of(block, url)
        # JSON answers have no newline at their end.
        said = subprocess.run(["bash", "-ec", script], check=True, capture_output=True, text=True).stdout
        decoder = json.JSONDecoder()
        while said := said.lstrip():
            answer, end = decoder.raw_decode(said)
            answers.append(answer)
            said = said[end:]
    refused = [answer["error"] for answer in answers if answer.get("error")]
    assert [error["type"] for error in refused] == [NEEDS_ANOTHER_MODEL] * 2, refused
    assert all(error["message"].startswith(("match ", "texts ")) for error in refused)
    assert sum("caption" in answer for answer in answers) == 5
    assert len(answers) == 10


def test_the_python_blocks_print_answers(url: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks("python", where="endpoint"):
        exec(compile(code_of(block, url), block.page, "exec"), {})
        assert capsys.readouterr().out.strip(), block.text
