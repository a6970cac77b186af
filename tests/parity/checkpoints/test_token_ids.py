"""If a configuration leaves out special tokens, the engine still generates what transformers generates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blip2_actor import EngineConfig, GenerationOptions
from blip2_actor.testing import random_images, tiny_tokenizer
from tests.parity.checkpoints.edited_checkpoint import copy_with, engine_ids, reference_ids

OPTIONS = GenerationOptions(max_new_tokens=8)
IMAGES = [image.numpy() for image in random_images(2)]


def _without(folder: Path, target: Path, *names: str, null: bool = False, **fields: Any) -> Path:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    for name in names:
        config["text_config"].pop(name, None)
        if null:
            config["text_config"][name] = None
    config["text_config"] |= fields
    return copy_with(folder, target, {"config.json": config, "generation_config.json": None})


@pytest.mark.parametrize(
    ("language", "names", "null"),
    [
        ("t5", ["decoder_start_token_id"], False),  # an answer starts with bos_token_id
        ("t5", ["eos_token_id", "pad_token_id"], True),  # only max_new_tokens ends an answer
        ("opt", ["bos_token_id", "eos_token_id", "pad_token_id"], False),
    ],
)
def test_missing_tokens_are_those_that_transformers_takes(
    checkpoint_folder: Callable[..., Path], tmp_path: Path, language: str, names: list[str], null: bool
) -> None:
    folder = _without(checkpoint_folder(language), tmp_path, *names, null=null)
    assert engine_ids(folder, IMAGES, options=OPTIONS) == reference_ids(folder, IMAGES, max_new_tokens=8)


@pytest.mark.parametrize(("language", "null"), [("t5", False), ("opt", True)])
def test_a_caption_without_start_token_continues_an_empty_text(
    checkpoint_folder: Callable[..., Path], tmp_path: Path, language: str, null: bool
) -> None:
    """transformers' `generate` fails without `bos_token_id`; its processor turns "" into these tokens."""
    folder = _without(checkpoint_folder(language), tmp_path, "bos_token_id", null=null)
    empty_ids = tiny_tokenizer(language)("").input_ids
    theirs = reference_ids(folder, IMAGES, empty_ids, max_new_tokens=8)
    assert engine_ids(folder, IMAGES, options=OPTIONS) == theirs


def test_a_model_may_have_no_end_token(checkpoint_folder: Callable[..., Path], tmp_path: Path) -> None:
    """Without `pad_token_id`, taking the first one of an empty list used to raise IndexError."""
    folder = _without(checkpoint_folder("opt"), tmp_path, "pad_token_id", null=True, eos_token_id=[])
    assert [len(ids) for ids in engine_ids(folder, IMAGES, options=OPTIONS)] == [8, 8]


def test_a_t5_without_any_start_token_is_refused_before_work(
    checkpoint_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = _without(checkpoint_folder("t5"), tmp_path, "bos_token_id", "decoder_start_token_id")
    with pytest.raises(ValueError, match=r"must have decoder_start_token_id or bos_token_id, got neither"):
        EngineConfig(model=str(folder), device="cpu").info()
