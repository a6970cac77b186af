"""Pictures for the examples: drawn scenes whose true captions are known, as PNG files."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from blip2_actor.demo import SceneSampler, draw

SIZE_PX = 128


def draw_pictures(folder: Path, num_pictures: int) -> dict[str, str]:
    """Write `scene-0000.png`, … to a folder, and return the true caption of each file.

    An existing picture is not rewritten, because a run refuses an input that has changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scenes = SceneSampler("held_out", seed=0).sample(num_pictures)
    truth = {}
    for number, pixels in enumerate(draw(scenes, SIZE_PX)):
        name = f"scene-{number:04d}.png"
        if not (folder / name).exists():
            Image.fromarray(pixels).save(folder / name)
        truth[name] = str(scenes.captions[number])
    return truth
