"""Tiny checkpoints with edited JSON files, and what the engine and transformers generate with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Blip2ForConditionalGeneration

from blip2_actor import GenerationOptions, Request
from blip2_actor.testing import IMAGE_TOKEN_ID, NUM_QUERIES
from tests.engines import cpu_config

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def copy_with(folder: Path, target: Path, files: dict[str, Any]) -> Path:
    """Make a checkpoint of links to another one's files and of JSON files; None leaves a file out."""
    target.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name not in files:
            (target / path.name).symlink_to(path)
    for name, content in files.items():
        if content is not None:
            (target / name).write_text(json.dumps(content))
    return target


def pixel_values(images: Sequence[np.ndarray]) -> Tensor:
    """Return uint8[S, S, 3] images as the published processor normalizes them: float[B, 3, S, S]."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def reference_ids(
    folder: Path, images: Sequence[np.ndarray], text_ids: Sequence[int] | None = None, **options: Any
) -> list[list[int]]:
    """Return the new tokens of transformers; without `text_ids`, it chooses the start of the text itself."""
    model = Blip2ForConditionalGeneration.from_pretrained(folder).eval()
    num_given = NUM_QUERIES + (1 if text_ids is None else len(text_ids))
    if text_ids is not None:
        rows = [[IMAGE_TOKEN_ID] * NUM_QUERIES + list(text_ids)] * len(images)
        options["input_ids"] = torch.tensor(rows)
    if model.config.text_config.model_type == "t5":
        num_given = 1
    with torch.no_grad():
        new_ids: list[list[int]] = model.generate(pixel_values(images), **options)[:, num_given:].tolist()
    return new_ids


def engine_ids(
    folder: Path,
    images: Sequence[np.ndarray],
    prompt: str | None = None,
    options: GenerationOptions | None = None,
    **engine: Any,
) -> list[list[int]]:
    """Return the new tokens of the engine, in float32."""
    config = cpu_config(folder, skip_self_test=True, **engine)
    requests = [Request(image=image, prompt=prompt) for image in images]
    with config.build() as started:
        results = started.generate(requests, *([] if options is None else [options]))
    return [list(result.token_ids) for result in results]
