"""The fenced blocks of the README and the pages, and which of them tests run unchanged.

A comment before a block says where it runs: `<!-- run -->` in a folder with `picture.png`,
`<!-- run: captions -->` in the folder where the README's commands have run, `<!-- run: endpoint -->` next
to an endpoint, in a folder with `photo.jpg`, `one.jpg` and `two.jpg`.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")))
ANYWHERE = "anywhere"
_BLOCK = re.compile(
    r"^(?: *<!-- (?P<run>run)(?:: (?P<where>\w+))? -->\n)?"
    r"(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block; `where` says in which surroundings it runs, and is empty if no test runs it."""

    page: str
    language: str
    text: str
    where: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command; commands may continue on the next line."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(language: str, pages: tuple[str, ...] = PAGES, where: str | None = None) -> list[Block]:
    """Return the blocks in a language, in the order of the pages: all, or those that run somewhere."""
    found = [
        Block(page, match["language"], match["text"], (match["where"] or ANYWHERE) if match["run"] else "")
        for page in pages
        for match in _BLOCK.finditer((ROOT / page).read_text())
    ]
    return [block for block in found if block.language == language and where in (None, block.where)]
