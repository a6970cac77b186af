"""A drawn scene, for trying the demonstration model without a suitable picture."""

from __future__ import annotations

import io
import secrets

from PIL import Image

from blip2_actor.demo import SceneSampler, draw

SIDE_PX = 320


def draw_scene_png() -> tuple[bytes, str]:
    """Draw a scene that is not in the training set; return it as PNG, with its true caption."""
    scenes = SceneSampler("held_out", secrets.randbits(32)).sample(1)
    png = io.BytesIO()
    Image.fromarray(draw(scenes, SIDE_PX)[0]).save(png, "PNG")
    return png.getvalue(), str(scenes.captions[0])
