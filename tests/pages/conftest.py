"""The browser in which all pages are tested."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
"""A camera that shows a test picture, and that every page may use."""

EXPECT_MS = 20_000
"""How long `expect` waits; its default of 5 s is too short for a model on a busy machine."""


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start Chromium, and end it after the block."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert program, f"install one of {', '.join(BROWSERS)}; Debian and Ubuntu: apt-get install chromium"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", *CAMERA])
        yield started
        started.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=EXPECT_MS)
    with open_browser() as started:
        yield started
