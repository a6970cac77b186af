"""Every field of an image processor's file is applied, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BlipImageProcessorPil

from blip2_actor import EngineConfig, resize_image
from blip2_actor.checkpoints.checkpoint import DEMO_FOLDER, Checkpoint
from blip2_actor.checkpoints.image_processor import ImageProcessor
from blip2_actor.models.vision import PixelNormalizer

SQUARE = {"height": 28, "width": 28}
STORED = {
    "image_processor_type": "BlipImageProcessor",
    "do_resize": True,
    "size": SQUARE,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 0.00392156862745098,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_convert_rgb": True,
}
IMAGE = Image.fromarray(np.arange(40 * 60 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 60, 3))


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_normalize": None},
        {"do_rescale": None},
        {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": [1, 2, 3]},
        {"size": 28},
        {"size": [28, 28]},
        {"do_center_crop": True, "crop_size": SQUARE},
        {"do_center_crop": None, "crop_size": None, "do_pad": None, "device": None},  # as 4.57 writes it
        {"image_processor_type": "BlipImageProcessorFast", "do_convert_rgb": False},
    ],
)
def test_pixels_equal_those_of_the_processor(tmp_path: Path, changed: dict[str, Any]) -> None:
    """do_normalize, do_rescale and numbers for all channels used to be ignored, and null counted as true."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(STORED | changed))
    theirs = BlipImageProcessorPil.from_pretrained(tmp_path)(IMAGE, return_tensors="pt").pixel_values
    ours = Checkpoint(tmp_path).image_processor
    normalizer = PixelNormalizer(ours.mean, ours.std, ours.rescale_factor)
    pixels = normalizer(torch.from_numpy(resize_image(IMAGE, 28))[None], torch.float32)
    assert ours.size_px == 28
    assert torch.equal(pixels, theirs.to(torch.float32))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_processor_type", "CLIPImageProcessor"),
        ("do_resize", False),
        ("do_resize", None),
        ("resample", 2),
        ("resample", 0),
        ("resample", 3.0),
        ("size", {"shortest_edge": 28}),
        ("size", {"height": 28, "width": 56}),
        ("do_center_crop", True),
        ("do_pad", True),
        ("rescale_factor", 0.003),
        ("rescale_factor", 0),
        ("image_mean", [0.5]),
        ("image_std", [1, 0, 1]),
    ],
)
def test_a_field_that_is_not_supported_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name} in processor\.json must be .*, got "):
        ImageProcessor.of(STORED | {name: value}, "processor.json")


def test_both_files_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    """Version 5 writes processor_config.json and keeps the older file."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(STORED | {"image_mean": [1, 1, 1]}))
    assert Checkpoint(tmp_path).image_processor.mean == (1, 1, 1)
    nested = {"processor_class": "Blip2Processor", "image_processor": STORED | {"image_mean": [2, 2, 2]}}
    (tmp_path / "processor_config.json").write_text(json.dumps({"num_query_tokens": 5}))
    assert Checkpoint(tmp_path).image_processor.mean == (1, 1, 1)
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert Checkpoint(tmp_path).image_processor.mean == (2, 2, 2)
    assert BlipImageProcessorPil.from_pretrained(tmp_path).image_mean == (2, 2, 2)


def test_a_processor_for_another_size_is_refused_before_work(tmp_path: Path) -> None:
    for path in DEMO_FOLDER.iterdir():
        if path.name not in ("processor_config.json", "preprocessor_config.json"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(STORED))
    with pytest.raises(ValueError, match=r"^size of the image processor must be .* 64, got 28"):
        EngineConfig(model=str(tmp_path), device="cpu").info()
