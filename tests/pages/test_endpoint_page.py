"""The page of the endpoint in a real browser, against real routes and the demonstration model.

It streams, shows alternatives, answers and where the model looked, takes pictures in every way, works by
keyboard and on a phone, and loads nothing from elsewhere. As `test_report_pages.py`, it needs Chromium:
`make pages`.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from starlette.types import ASGIApp

from blip2_actor import EngineBuilder, EngineConfig, FetchPolicy, GenerationOptions
from blip2_actor.demo import SceneSampler, draw
from blip2_actor.testing import FakeEngineConfig
from deploy.guard.access import Access
from deploy.guard.keys import KeyFile
from deploy.http.images import ImageSource
from deploy.http.served_model import ServedModel
from deploy.reuse.made import Made
from deploy.work import ImageWork, TextPiece
from tests.unit.deploy.routes.engine_service import EngineService

DESKTOP, PHONE = (1280, 900), (390, 844)
KEY = "a-key-of-the-tests"
TIMEOUT_S = 20


class HeldService(EngineService):
    """Holds streams after their first piece, as a slow model would, until the test releases them."""

    def __init__(self, engine: EngineBuilder) -> None:
        policy = FetchPolicy(hosts=(), max_bytes=5 << 20)
        super().__init__(engine, GenerationOptions(), image_policy=policy)
        self.go_on = threading.Event()
        self.go_on.set()

    async def stream(
        self, model: ServedModel, source: ImageSource, work: ImageWork
    ) -> AsyncGenerator[TextPiece | Made, None]:
        async for item in super().stream(model, source, work):
            yield item
            while not self.go_on.is_set():
                await asyncio.sleep(0.01)


class Endpoint:
    """Routes behind a real server, in a thread."""

    def __init__(self, app: ASGIApp) -> None:
        config = uvicorn.Config(app, port=0, lifespan="off", log_level="warning")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        wait_until(lambda: self._server.started)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(TIMEOUT_S)


class Opened:
    """The page in a browser, with records of everything that must not happen on it."""

    def __init__(self, browser: Browser, url: str, size=DESKTOP, scheme="light", **options) -> None:
        self.context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, **options
        )
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(1000 * TIMEOUT_S)
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)
        expect(self.page.locator("#model")).not_to_have_text("…")

    def choose(self, image: bytes, name: str = "photo.png") -> None:
        self.page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": image})

    def wait_for_answer(self) -> str:
        """Wait until the request has ended; return the caption."""
        expect(self.page.locator("#details")).to_contain_text("log-probability")
        return self.page.inner_text("#caption")


def wait_until(is_true) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def scene(seed: int = 5) -> tuple[bytes, str]:
    """Return a drawn scene as PNG, and its caption."""
    scenes = SceneSampler("train", seed).sample(1)
    file = io.BytesIO()
    Image.fromarray(draw(scenes, 320)[0]).save(file, "PNG")
    return file.getvalue(), str(scenes.captions[0])


@pytest.fixture(scope="module")
def service() -> HeldService:
    return HeldService(EngineConfig(model="demo", device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def endpoint(service) -> Iterator[Endpoint]:
    started = Endpoint(service.api)
    yield started
    started.close()


@pytest.fixture(scope="module")
def other_model() -> Iterator[Endpoint]:
    """A model that is not the demonstration, and repeats its prompts."""
    started = Endpoint(HeldService(FakeEngineConfig(model="some/model")).api)
    yield started
    started.close()


@pytest.fixture
def opened(browser, endpoint) -> Iterator[Opened]:
    shown = Opened(browser, endpoint.url)
    yield shown
    assert not shown.problems
    assert {urlsplit(url).netloc or "blob" for url in shown.requests} <= {
        urlsplit(endpoint.url).netloc,
        "blob",
    }
    shown.context.close()


@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (PHONE, "light"), (DESKTOP, "dark")])
def test_the_page_fits_and_has_no_serious_fault(browser, endpoint, size, scheme):
    """The page before an answer, and with everything that an answer can have."""
    shown = Opened(browser, endpoint.url, size, scheme)
    for is_answered in (False, True):
        if is_answered:
            shown.page.fill("#questions", "a red\na very_long_word" + "_long" * 14)
            shown.page.select_option("#search", label="5 beams, the 3 best texts")
            shown.page.check("#attention")
            shown.choose(scene()[0])
            shown.wait_for_answer()
            shown.page.click("text=Python")
        assert shown.page.evaluate("document.documentElement.scrollWidth") <= size[0]
        found = Axe().run(shown.page).response["violations"]
        assert [(fault["id"], fault["nodes"][0]["html"]) for fault in found] == []
    assert not shown.problems
    shown.context.close()


@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (PHONE, "light"), (DESKTOP, "dark")])
def test_the_list_of_routes_fits_and_has_no_serious_fault(browser, endpoint, size, scheme):
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(f"{endpoint.url}docs")
    expect(page.get_by_text("Caption one image, answer questions about it")).to_be_visible()
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true })")
    expect(page.get_by_text("Maximum number of new tokens").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    found = Axe().run(page).response["violations"]
    assert [(fault["id"], fault["nodes"][0]["html"]) for fault in found] == []
    assert not problems
    context.close()


def test_the_text_appears_as_it_grows(opened, service):
    image, caption = scene()
    service.go_on.clear()
    opened.choose(image)
    expect(opened.page.locator("#caption")).to_have_text(re.compile("^an?"))
    assert opened.page.inner_text("#caption") != caption
    expect(opened.page.locator("#stop")).to_be_visible()
    service.go_on.set()
    assert opened.wait_for_answer() == caption
    expect(opened.page.locator("#stop")).to_be_hidden()


def test_a_request_can_be_stopped(opened, service):
    service.go_on.clear()
    opened.choose(scene()[0])
    expect(opened.page.locator("#caption")).to_have_text(re.compile("^an?"))
    with opened.page.expect_event("requestfailed") as failed:  # the service notices that the caller has left
        opened.page.click("#stop")
    assert failed.value.url.endswith("/v1/caption")
    expect(opened.page.locator("#caption")).to_have_text("Stopped.")
    service.go_on.set()
    opened.page.click("#go")
    assert opened.wait_for_answer() == scene()[1]


def test_a_newer_request_takes_the_place_of_the_one_under_way(opened, service):
    service.go_on.clear()
    opened.choose(scene(5)[0])
    expect(opened.page.locator("#caption")).to_have_text(re.compile("^an?"))
    opened.choose(scene(6)[0])
    service.go_on.set()
    assert opened.wait_for_answer() == scene(6)[1] != scene(5)[1]
    wait_until(lambda: service.num_in_flight == 0)


def test_questions_are_answered_by_themselves(opened):
    image, caption = scene()
    words = caption.split()
    opened.page.fill("#questions", f"{' '.join(words[:2])}\n\n{' '.join(words[:5])}\n")
    opened.choose(image)
    opened.wait_for_answer()
    assert opened.page.locator("#answers dt").all_inner_texts() == [" ".join(words[:2]), " ".join(words[:5])]
    answers = opened.page.locator("#answers dd").all_inner_texts()
    assert [answer.split("\n")[0].strip() for answer in answers] == [" ".join(words[2:]), " ".join(words[5:])]
    assert all("log-probability −" in answer or "log-probability 0" in answer for answer in answers)


def test_examples_are_sent_as_questions_to_a_model_that_answers(browser, other_model):
    shown = Opened(browser, other_model.url)
    assert not shown.page.is_visible("#scene") and not shown.page.is_visible("#caveat")
    shown.page.click("#examples button >> nth=0")
    shown.page.click("#examples button >> nth=1")
    first, second = shown.page.input_value("#questions").split("\n")
    assert first.endswith("?") and second.endswith("?")
    shown.choose(scene()[0])
    shown.wait_for_answer()
    assert shown.page.locator("#answers dd").nth(1).inner_text().startswith(f"Question: {second} Answer:")
    shown.context.close()


def test_alternatives_have_scores_and_flags(browser, other_model):
    shown = Opened(browser, other_model.url)
    shown.page.fill("#prompt", "a photo of")
    shown.page.select_option("#search", label="5 beams, the 3 best texts")
    shown.choose(scene()[0])
    shown.wait_for_answer()
    alternatives = shown.page.locator("#alternatives li").all_inner_texts()
    assert len(alternatives) == 2  # the best one is the caption
    for text in (shown.page.inner_text("#details"), *alternatives):
        assert "log-probability −1.5" in text and "echoes_prompt: repeats the prompt" in text
    shown.context.close()


def test_where_it_looked_is_framed_and_said(opened, endpoint):
    image, _ = scene()
    opened.page.check("#attention")
    opened.choose(image)
    opened.wait_for_answer()
    answer = httpx.post(f"{endpoint.url}v1/caption?attention=true", content=image).json()
    rows = answer["attention"]
    row = max(range(8), key=lambda y: max(rows[y]))
    column = rows[row].index(max(rows[row]))
    assert f"row {row + 1}, column {column + 1} of a grid of 8 × 8" in opened.page.inner_text("#looked")
    picture, frame = (opened.page.locator(name).bounding_box() for name in ("#preview", "#peak"))
    assert frame["x"] == pytest.approx(picture["x"] + column * picture["width"] / 8, abs=1)
    assert frame["y"] == pytest.approx(picture["y"] + row * picture["height"] / 8, abs=1)
    darkness = "[...overlay.getContext('2d').getImageData(0, 0, 8, 8).data].filter((_, i) => i % 4 === 3)"
    shades = opened.page.evaluate(
        f"() => {{ const overlay = document.getElementById('overlay'); return {darkness}; }}"
    )
    assert shades.index(min(shades)) == 8 * row + column and max(shades) > 150
    opened.page.uncheck("#attention")
    opened.wait_for_answer()
    assert not opened.page.is_visible("#overlay") and not opened.page.is_visible("#looked")


def test_the_programs_that_it_shows_give_its_caption(opened, tmp_path):
    image, _ = scene()
    opened.page.fill("#prompt", 'it\'s "a" \\ $HOME @red; <b>')
    opened.page.fill("#questions", "is it 'red'?\na blue")
    opened.page.select_option("#search", label="5 beams, the 5 best texts")
    opened.page.check("#attention")
    opened.choose(image, "my-photo.png")
    caption = opened.wait_for_answer()
    (tmp_path / "my-photo.png").write_bytes(image)
    curl = opened.page.text_content("#curl")
    by_curl = subprocess.run(
        ["bash", "-c", curl], cwd=tmp_path, capture_output=True, check=True, timeout=TIMEOUT_S
    )
    answer = httpx.Response(200, content=by_curl.stdout).json()
    assert answer["caption"] == caption and len(answer["captions"]) == 5 and answer["attention"]
    assert len(answer["answers"]) == 2
    assert run_python(opened.page, tmp_path) == caption


def run_python(page: Page, folder: Path) -> str:
    command = [sys.executable, "-c", page.text_content("#python") or ""]
    env = os.environ | {"BLIP2_KEY": KEY}
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, check=True, timeout=60, text=True
    )
    return done.stdout.removesuffix("\n")


def test_it_asks_for_the_key_of_the_service(browser, service, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"somebody {hashlib.sha256(KEY.encode()).hexdigest()}\n")
    endpoint = Endpoint(Access(service.api, keys=KeyFile(str(keys))))
    context = browser.new_context()
    page = context.new_page()
    page.goto(endpoint.url)
    for key in ("wrong", KEY):
        expect(page.locator("#key-dialog")).to_be_visible()
        expect(page.get_by_label("This service asks for a key")).to_have_value("")
        page.get_by_label("This service asks for a key").type(key)
        page.keyboard.press("Enter")
    expect(page.locator("#model")).to_contain_text("demo")
    image, caption = scene()
    page.set_input_files("#file", {"name": "photo.png", "mimeType": "image/png", "buffer": image})
    expect(page.locator("#details")).to_contain_text("log-probability")
    assert KEY not in page.content() and "Bearer $BLIP2_KEY" in page.text_content("#curl")
    (tmp_path / "photo.png").write_bytes(image)
    assert run_python(page, tmp_path) == caption
    context.close()
    endpoint.close()


def test_a_picture_comes_from_the_camera(opened):
    opened.page.click("#camera")
    opened.page.click("#shoot")
    opened.wait_for_answer()
    assert "640×480" in opened.page.inner_text("#details")
    assert opened.page.evaluate("video.srcObject.getTracks().map((track) => track.readyState)") == ["ended"]
    with opened.page.expect_download() as download:
        opened.page.click("#save")
    with Image.open(download.value.path()) as saved:
        assert saved.size == (640, 480)


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_a_picture_is_pasted_or_dropped(opened, way):
    image, caption = scene()
    opened.page.evaluate(
        """([way, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "a picture.png", {type: "image/png"}));
            const event = way === "paste"
                ? new ClipboardEvent("paste", {clipboardData: data, bubbles: true})
                : new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true});
            document.body.dispatchEvent(event);
        }""",
        [way, list(image)],
    )
    assert opened.wait_for_answer() == caption


def test_the_demonstration_draws_scenes_and_says_what_it_knows(opened):
    assert "drawn scenes only" in opened.page.inner_text("#caveat")
    opened.page.click("#scene")
    opened.wait_for_answer()
    drawn = opened.page.inner_text("#drawn")
    assert re.search("“an? .* background”", drawn)


def test_the_keyboard_alone_is_enough(opened, tmp_path):
    image, caption = scene()
    (tmp_path / "photo.png").write_bytes(image)
    keyboard = opened.page.keyboard
    focused = "document.activeElement.id"
    keyboard.press("Tab")
    assert opened.page.evaluate(focused) == "routes"
    keyboard.press("Tab")
    assert opened.page.evaluate(focused) == "file"
    assert opened.page.evaluate("getComputedStyle(document.getElementById('drop')).outlineStyle") == "solid"
    with opened.page.expect_file_chooser() as chooser:
        # A key could reach the page before the request to report its choosers; a script cannot.
        opened.page.evaluate("0")
        keyboard.press("Enter")
    chooser.value.set_files(tmp_path / "photo.png")
    assert opened.wait_for_answer() == caption
    while opened.page.evaluate(focused) != "prompt":
        keyboard.press("Tab")
    keyboard.type(" ".join(caption.split()[:3]))
    keyboard.press("Enter")
    expect(opened.page.locator("#caption")).to_have_text(" ".join(caption.split()[3:]))


def test_a_screen_reader_hears_whole_texts_once(opened, service):
    """The growing text is not announced, but the state and the whole answer are."""
    image, caption = scene()
    status = opened.page.get_by_role("status")
    service.go_on.clear()
    opened.choose(image)
    expect(status).to_have_text("The model is reading the picture.")
    assert opened.page.locator("[aria-live]").count() == 0
    service.go_on.set()
    expect(status).to_contain_text(f"{caption}.")
    for role, name in [
        ("textbox", "The text begins with"),
        ("textbox", "Questions, or other beginnings of a text, one on each line"),
        ("combobox", "Search"),
        ("checkbox", "Show where it looked"),
        ("button", "Caption"),
    ]:
        assert opened.page.get_by_role(role, name=name).count() == 1


def test_what_is_wrong_is_said(browser, endpoint):
    shown = Opened(browser, endpoint.url)
    shown.choose(b"not a picture", "notes.png")
    expect(shown.page.locator("#details")).to_have_text("422 · undecodable")
    assert shown.page.locator("#caption.bad").count() == 1
    assert "cannot show this picture" in shown.page.inner_text("#hint")
    image, caption = scene()
    shown.choose(image)
    assert shown.wait_for_answer() == caption and not shown.page.is_visible("#hint")
    shown.page.fill("#prompt", "a" * 600)
    shown.page.click("#go")
    expect(shown.page.locator("#details")).to_contain_text("422 · refused")
    shown.context.close()


def test_the_documentation_is_shown(browser, endpoint):
    context = browser.new_context()
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.goto(endpoint.url)
    page.click("#routes")
    expect(page.locator("#routes")).to_contain_text("/v1/caption")
    assert not problems
    context.close()
