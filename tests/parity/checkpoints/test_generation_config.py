"""A checkpoint's `generation_config.json` works as in transformers' `generate(generation_config=…)`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from blip2_actor import EngineConfig, GenerationOptions, Request, Status
from blip2_actor.testing import random_images
from tests.parity.checkpoints.edited_checkpoint import copy_with, reference_ids

IMAGES = [image.numpy() for image in random_images(2)]
FILE = "generation_config.json"
BEAMS = {"num_beams": 3, "max_new_tokens": 9, "repetition_penalty": 1.4, "length_penalty": -1.0}


@pytest.mark.parametrize("language", ["opt", "t5"])
def test_options_that_are_not_given_are_those_of_the_file(
    checkpoint_folder: Callable[..., Path], tmp_path: Path, language: str
) -> None:
    content = BEAMS | {"use_cache": True, "transformers_version": "4.27"}
    config = _config(checkpoint_folder(language), tmp_path, content, num_threads=1, skip_self_test=True)
    given = GenerationOptions(num_beams=1)
    requests = [Request(image=image, options=options) for options in (None, given) for image in IMAGES]
    with dataclasses.replace(config, dtype="float32").build() as engine:
        found = [list(result.token_ids) for result in engine.generate(requests)]
    stored = GenerationConfig.from_pretrained(tmp_path)
    assert found[:2] == reference_ids(tmp_path, IMAGES, generation_config=stored)
    assert found[2:] == reference_ids(tmp_path, IMAGES, generation_config=stored, num_beams=1)


def test_a_stored_minimum_ends_at_a_given_maximum(
    checkpoint_folder: Callable[..., Path], tmp_path: Path
) -> None:
    config = _config(checkpoint_folder("opt"), tmp_path, {"min_new_tokens": 8}, num_threads=1)
    with dataclasses.replace(config, dtype="float32", skip_self_test=True).build() as engine:
        found = [list(result.token_ids) for result in engine.generate(IMAGES, max_new_tokens=5)]
    stored = GenerationConfig.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="Unfeasible length constraints"):
        assert found == reference_ids(tmp_path, IMAGES, generation_config=stored, max_new_tokens=5)


def _config(folder: Path, target: Path, content: dict[str, Any], **engine: Any) -> EngineConfig:
    return EngineConfig(model=str(copy_with(folder, target, {FILE: content})), device="cpu", **engine)


def test_info_lists_what_the_file_changes(checkpoint_folder: Callable[..., Path], tmp_path: Path) -> None:
    """transformers samples from the top 50 if the file does not set top_k."""
    content = {
        "max_new_tokens": 30,
        "do_sample": True,
        "num_beams": 1,
        "top_p": None,
        "_from_model_config": True,
    }
    config = _config(checkpoint_folder("opt"), tmp_path, content)
    assert config.info().generation_config == {"do_sample": True, "top_k": 50}


def test_lists_of_the_file_are_options_and_empty_ones_are_the_defaults(
    checkpoint_folder: Callable[..., Path], tmp_path: Path
) -> None:
    content = {"suppress_tokens": [], "bad_words_ids": [[5], [6, 7]]}
    stored = _config(checkpoint_folder("opt"), tmp_path, content).info().generation_config
    assert stored == {"bad_words_ids": ((5,), (6, 7))}
    assert GenerationOptions().resolve(stored).bad_words_ids == ((5,), (6, 7))


def test_an_option_of_the_file_waits_for_the_search_that_it_is_for(
    checkpoint_folder: Callable[..., Path], tmp_path: Path
) -> None:
    content = {"length_penalty": -1.0, "temperature": 0.7}
    stored = _config(checkpoint_folder("opt"), tmp_path, content).info().generation_config
    assert GenerationOptions().resolve(stored) == GenerationOptions().resolve()
    assert GenerationOptions(num_beams=3).resolve(stored).length_penalty == -1.0
    assert GenerationOptions(do_sample=True).resolve(stored).temperature == 0.7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epsilon_cutoff": 0.5}, "must not have 'epsilon_cutoff', which is not supported, got 0.5"),
        ({"num_beam_groups": 2, "num_beams": 2}, "must not have 'num_beam_groups'"),
        ({"suppress_tokens": [-5]}, "suppress_tokens must be token ids from 0, got (-5,)"),
        ({"max_length": 40}, "got 40; use max_new_tokens"),
        ({"forced_bos_token_id": 0}, "must not have 'forced_bos_token_id', which is not supported, got 0"),
        ({"forced_eos_token_id": 0}, "must not have 'forced_eos_token_id', which is not supported, got 0"),
        ({"watermarking_config": {}}, "must not have 'watermarking_config'"),
        ({"eos_token_id": [3, 5]}, "must not have 'eos_token_id'"),
        ({"eos_token_id": [3, "5"]}, "must not have 'eos_token_id'"),
        ({"temperature": -1, "do_sample": True}, "temperature must be from 1e-06 to 1e+06, got -1"),
        ({"num_beams": "many"}, "num_beams must be a whole number, got 'many'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name_before_work(
    checkpoint_folder: Callable[..., Path], tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    config = _config(checkpoint_folder("opt"), tmp_path, content)
    with pytest.raises(ValueError) as caught:
        config.info()
    assert message in str(caught.value)
    assert "or set ignore_generation_config" in str(caught.value)
    ignoring = EngineConfig(model=config.model, device="cpu", ignore_generation_config=True)
    assert ignoring.info().generation_config == {}


def test_what_changes_no_answer_is_no_reason_to_refuse(
    checkpoint_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint_folder("t5")
    written = json.loads((folder / FILE).read_text())
    unused = {
        "max_length": 20,
        "max_new_tokens": 5,
        "typical_p": 1.0,
        "num_beam_groups": 1,
        "our_own_note": "x",
    }
    unused |= {"suppress_tokens": None, "bad_words_ids": [], "diversity_penalty": 0.0, "guidance_scale": 1}
    assert _config(folder, tmp_path, written | unused).info().generation_config == {"max_new_tokens": 5}
    derived = {"_from_model_config": True, "eos_token_id": 2, "decoder_start_token_id": 3}
    assert _config(folder, tmp_path / "derived", derived).info().generation_config == {}


def test_a_request_that_contradicts_the_file_is_a_row_with_a_status(
    checkpoint_folder: Callable[..., Path], tmp_path: Path
) -> None:
    config = _config(checkpoint_folder("opt"), tmp_path, BEAMS, num_threads=1, skip_self_test=True)
    with config.build() as engine:
        bad = Request(image=IMAGES[0], options=GenerationOptions(num_return_sequences=4))
        refused, good = engine.generate([bad, Request(image=IMAGES[1])])
    assert (refused.status, good.status) == (Status.REFUSED, Status.OK)
    assert refused.error is not None
    assert "num_return_sequences must be at most num_beams (3)" in refused.error
