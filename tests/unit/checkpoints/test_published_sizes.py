"""The table of published checkpoints agrees with their configurations."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from blip2_actor.testing import random_config

PAGE = Path(__file__).parents[3] / "docs" / "checkpoints.md"
IMAGE_PX = {"": 224, "-coco": 364}
GIB = 2**30


def _rows() -> list[list[str]]:
    lines = PAGE.read_text().splitlines()
    table = [line for line in lines if line.startswith("| `blip2") and line.count("|") > 6]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table]


@cache
def _count_parameters(size: str, image_size_px: int) -> int:
    has_language_model = "itm" not in size
    config = random_config(size if has_language_model else "blip2-opt-2.7b")
    config.vision_config.image_size = image_size_px
    with torch.device("meta"):
        if has_language_model:
            model: torch.nn.Module = Blip2ForConditionalGeneration(config)
        else:
            config.qformer_config.use_qformer_text_input = True
            model = Blip2ForImageTextRetrieval(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("row", _rows(), ids=lambda row: row[0])
def test_sizes_are_those_of_the_configuration(row: list[str]) -> None:
    name, _, _, image_size_px, billions, download_gb, float32_gib, bfloat16_gib, _ = row
    size, fine_tuned = re.fullmatch(r"(blip2-.+?)(-coco)?", name).groups()  # type: ignore[union-attr]
    assert int(image_size_px) == IMAGE_PX[fine_tuned or ""]
    parameters = _count_parameters(size, int(image_size_px))
    assert billions == f"{parameters / 1e9:.2f}"
    assert (float32_gib, bfloat16_gib) == (f"{parameters * 4 / GIB:.1f}", f"{parameters * 2 / GIB:.1f}")
    if download_gb:  # float32 files, which may hold a shared tensor twice
        assert parameters * 4 / 1e9 - 0.05 <= float(download_gb) <= parameters * 4 / 1e9 * 1.04


def test_the_table_lists_each_published_family() -> None:
    assert len(_rows()) == 9
