"""Make `docs/images/report.png` anew: the report of a real run of the demonstration, as Chromium shows it.

python -m tests.pages.picture
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import ViewportSize

from pipeline.cli.main import main
from tests.pages.conftest import open_browser

PICTURE = Path(__file__).parents[2] / "docs/images/report.png"
VIEWPORT: ViewportSize = {"width": 1280, "height": 900}
COLORS = 128
"""Of the stored picture; a third of its bytes, and no difference to the eye."""


def make_picture() -> None:
    """Run the demonstration in a temporary folder, and store the top of its report."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # The heading of the report is the path of its output.
        assert main(["demo", "--num-images", "600", "--output", "demo"]) == 0
        assert main(["report", "demo/captions", "--html", "report.html"]) == 0
        with open_browser() as browser:
            page = browser.new_page(viewport=VIEWPORT, color_scheme="light")
            page.goto(Path("report.html").absolute().as_uri())
            page.screenshot(path="report.png")
        Image.open("report.png").convert("RGB").quantize(COLORS).save(PICTURE, optimize=True)
        os.chdir("/")


if __name__ == "__main__":
    make_picture()
