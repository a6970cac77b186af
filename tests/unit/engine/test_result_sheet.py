"""A notebook's view of results: pictures are embedded in the page, and texts are not read as HTML."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from blip2_actor import Result, ResultSheet, Status
from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.inputs import result_sheet
from blip2_actor.request import Completion


def ok(text: str) -> Result:
    completion = Completion(
        text=text, token_ids=(1,), token_logprobs=(-0.5,), logprob=-0.5, finish_reason="stop"
    )
    return Result(completions=(completion,))


def test_images_stand_next_to_their_texts():
    blue = np.full((30, 60, 3), (0, 0, 255), np.uint8)
    bad = Result(status=Status.UNDECODABLE, error="no image <x>")
    sheet = ResultSheet([blue, b"no image", "http://host/a.jpg"], [ok("<b>a dog</b>"), bad, ok("a cat")])
    assert repr(sheet) == "ResultSheet(3 results, 2 ok)"
    shown = sheet._repr_html_()
    assert "&lt;b&gt;a dog&lt;/b&gt;" in shown and "undecodable: no image &lt;x&gt;" in shown
    [picture] = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', shown)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))
    assert pixels.shape == (160, 160, 3) and pixels[80, 80, 2] > 240
    assert "http://host" not in shown  # neither we nor the browser fetch anything


def test_a_shared_image_is_shown():
    """An image returned by `Engine.image` used to be a gray square, as if unreadable."""
    shown = ResultSheet([EncodedImage(np.zeros((64, 64, 3), np.uint8))], [ok("a dog")])._repr_html_()
    assert shown.count("<img") == 1


def test_a_sheet_has_an_end(monkeypatch):
    monkeypatch.setattr(result_sheet, "MAX_SHOWN", 2)
    shown = ResultSheet([None, None, None], [ok("a")] * 3)._repr_html_()  # type: ignore[list-item]
    assert shown.count("<figure") == 2 and "the first 2 of 3" in shown


def test_each_image_needs_its_result():
    with pytest.raises(ValueError, match=r"as many as the images \(1\), got 0"):
        ResultSheet([b""], [])
