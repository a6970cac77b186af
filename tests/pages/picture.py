"""Make the pictures of `docs/images/` anew, each from a real run of the demonstration.

python -m tests.pages.picture [report] [terminal]

The report is as Chromium shows it. The terminal is that of tmux, and rich draws its window.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import ViewportSize
from rich.console import Console
from rich.text import Text

from pipeline.cli.main import main
from tests.pages.conftest import open_browser

IMAGES = Path(__file__).parents[2] / "docs/images"
VIEWPORT: ViewportSize = {"width": 1280, "height": 900}
COLORS = 128
"""Number of colors of the stored pictures; a third of their bytes, and no difference to the eye."""
COLUMNS, LINES, WINDOW_PX = 80, 24, 1000
COMMAND = "blip2 demo --num-images 6000"
HALF_WAY = re.compile(r"^([23],\d{3}) images · .* ETA", re.MULTILINE)
MAX_WAIT_S = 300.0


def make_report() -> None:
    """Store the top of the report of a run."""
    assert main(["demo", "--num-images", "600", "--output", "demo"]) == 0
    assert main(["report", "demo/captions", "--html", "report.html"]) == 0
    take_picture("report", Path("report.html"), VIEWPORT)


def make_terminal() -> None:
    """Store the terminal in the middle of a run."""
    with tmux() as ask:
        ask("send-keys", COMMAND, "Enter")
        begun = time.monotonic()
        while not HALF_WAY.search(ask("capture-pane", "-p")):
            assert time.monotonic() < begun + MAX_WAIT_S, ask("capture-pane", "-p")
            time.sleep(0.1)
        screen = ask("capture-pane", "-e", "-p").rstrip()
    window = Console(record=True, width=COLUMNS, file=io.StringIO())
    for line in screen.splitlines():
        window.print(Text.from_ansi(line), soft_wrap=True)
    Path("terminal.svg").write_text(window.export_svg(title="blip2"))
    Path("terminal.html").write_text(f'<img src="terminal.svg" width="{WINDOW_PX}">')
    take_picture("terminal", Path("terminal.html"), VIEWPORT, "img")


@contextlib.contextmanager
def tmux() -> Iterator[Callable[..., str]]:
    """Start a terminal, and yield a function that sends commands to its server; end it after the block."""
    server = ["tmux", "-L", f"picture-{os.getpid()}", "-f", os.devnull]

    def ask(*words: str) -> str:
        return subprocess.run([*server, *words], check=True, capture_output=True, text=True).stdout

    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shell = ["env", f"PATH={path}", "PS1=$ ", "LANG=C.UTF-8", "bash", "--norc", "--noprofile"]
    ask("-u", "new-session", "-d", "-x", str(COLUMNS), "-y", str(LINES), *shell)
    try:
        yield ask
    finally:
        ask("send-keys", "C-c")
        ask("kill-server")


def take_picture(name: str, page_file: Path, size: ViewportSize, element: str | None = None) -> None:
    """Store what the browser shows of a file, or of an element of it."""
    with open_browser() as browser:
        page = browser.new_page(viewport=size, color_scheme="light")
        page.goto(page_file.absolute().as_uri())
        shown = page.locator(element).screenshot() if element else page.screenshot()
    picture = Image.open(io.BytesIO(shown)).convert("RGB")
    picture.quantize(COLORS).save(IMAGES / f"{name}.png", optimize=True)


PICTURES = {"report": make_report, "terminal": make_terminal}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # the heading of the report is the path of its output
        for name in sys.argv[1:] or PICTURES:
            PICTURES[name]()
        os.chdir("/")
