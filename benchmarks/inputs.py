"""Inputs of the benchmarks: photographs, shards and drawn scenes, written with a seed."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from blip2_actor.demo.scenes import SceneSampler, draw

SCENE_SIDE_PX = 320
MAX_LINKS = 50_000
"""Ext4 allows 65,000 links to one file."""


def write_photographs(folder: Path, count: int) -> Path:
    """Write `count` JPEGs of 640 x 480 pixels; return the folder."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{index:05d}.jpg", quality=90)
    return folder


def write_shards(work: Path, count: int, num_rows: int) -> Path:
    """Write `count` tars of `num_rows` small images each; return their folder.

    All tars are hard links to few files, so that a million rows need little disk space.
    """
    first = work / f"shard-of-{num_rows}.tar"
    if not first.exists():
        rng = np.random.default_rng(0)
        with tarfile.open(first, "w") as tar:
            for index in range(num_rows):
                content = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(content, "PNG")
                member = tarfile.TarInfo(f"{index:06d}.png")
                member.size = content.tell()
                content.seek(0)
                tar.addfile(member, content)
    folder = work / f"shards-{count}-of-{num_rows}"
    if folder.exists():
        return folder
    folder.mkdir()
    link_often(first, [folder / f"{index:06d}.tar" for index in range(count)])
    return folder


def link_often(source: Path, targets: Sequence[Path]) -> None:
    """Make hard links to one file, or to a few copies of it."""
    for start in range(0, len(targets), MAX_LINKS):
        shutil.copyfile(source, targets[start])
        for target in targets[start + 1 : start + MAX_LINKS]:
            os.link(targets[start], target)


def write_scenes(folder: Path, count: int) -> list[bytes]:
    """Write `count` drawn scenes as PNG; return the content of the files in order."""
    folder.mkdir()
    scenes = SceneSampler("held_out", 0).sample(count)
    for index in range(count):
        [pixels] = draw(scenes.slice(index, index + 1), SCENE_SIDE_PX)
        Image.fromarray(pixels).save(folder / f"{index:05d}.png")
    return [path.read_bytes() for path in sorted(folder.iterdir())]
