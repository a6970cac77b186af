"""Losses, gradients and scores against transformers, for both language models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Blip2ForConditionalGeneration

from blip2_actor.checkpoints.checkpoint import Checkpoint
from blip2_actor.checkpoints.loading import load_model
from blip2_actor.checkpoints.weights.load_weights import load_weights
from blip2_actor.checkpoints.weights.name_map import name_map
from blip2_actor.checkpoints.weights.weight_files import list_weights
from blip2_actor.models.blip2 import Blip2
from blip2_actor.testing import IMAGE_SIZE_PX, IMAGE_TOKEN_ID, NUM_QUERIES

LANGUAGES = ["opt", "t5"]
CPU = torch.device("cpu")


def load(folder: Path) -> Blip2:
    return load_model(Checkpoint(folder), CPU, torch.float32)


def make_pixels(count: int) -> Tensor:
    return torch.randn(count, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX, generator=torch.Generator().manual_seed(5))


def make_ids(*shape: int, seed: int = 6) -> Tensor:
    return torch.randint(5, 260, shape, generator=torch.Generator().manual_seed(seed))


def reference_loss(
    model: Blip2ForConditionalGeneration, pixel_values: Tensor, input_ids: Tensor, labels: Tensor
) -> Tensor:
    """Add the image tokens that the reference needs, and for OPT also labels for them."""
    image_ids = torch.full((len(input_ids), NUM_QUERIES), IMAGE_TOKEN_ID)
    if model.config.text_config.model_type == "opt":
        labels = torch.cat([torch.full_like(image_ids, -100), labels], dim=1)
    return model(pixel_values, input_ids=torch.cat([image_ids, input_ids], dim=1), labels=labels).loss


@pytest.mark.parametrize("language", LANGUAGES)
def test_loss_and_gradients_equal_the_reference(
    language: str,
    checkpoint_folder: Callable[..., Path],
    reference: Callable[..., Blip2ForConditionalGeneration],
    tmp_path: Path,
) -> None:
    """A detached part, or a shared parameter that is not shared here, would give other gradients."""
    ours, theirs = load(checkpoint_folder(language)).requires_grad_(True), reference(language)
    pixel_values, input_ids = make_pixels(3), make_ids(3, 7)
    labels = input_ids.clone() if language == "opt" else make_ids(3, 5, seed=7)
    labels[0, :2] = labels[1, -2:] = -100
    theirs.zero_grad()
    expected = reference_loss(theirs, pixel_values, input_ids, labels)
    expected.backward()
    loss, logits = ours(pixel_values, input_ids, labels)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert logits.shape == (*labels.shape, 264)

    # The reference's gradients are loaded like weights, so each lands at its counterpart.
    shutil.copy(checkpoint_folder(language) / "config.json", tmp_path)
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in theirs.named_parameters()
    }
    save_file(gradients, tmp_path / "model.safetensors")
    expected_gradients = load(checkpoint_folder(language))
    load_weights(
        expected_gradients,
        list_weights(tmp_path),
        name_map(language, theirs.config.qformer_config.cross_attention_frequency),
        "a test",
    )
    counterparts = dict(expected_gradients.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(
            gradient, counterparts[name], rtol=1e-3, atol=1e-5, msg=partial("{}: {}".format, name)
        )


@torch.no_grad()
@pytest.mark.parametrize("language", LANGUAGES)
def test_scores_of_texts_equal_the_reference(
    language: str,
    checkpoint_folder: Callable[..., Path],
    reference: Callable[..., Blip2ForConditionalGeneration],
) -> None:
    """Each row, with its own prompt and text, is scored as if alone; rows may share an image."""
    ours, theirs = load(checkpoint_folder(language)), reference(language)
    pixel_values = make_pixels(2)
    image_of_row, prompt_lengths, text_lengths = [0, 1, 1, 0], [1, 4, 4, 2], [6, 3, 9, 1]
    prompts = [make_ids(n, seed=i).tolist() for i, n in enumerate(prompt_lengths)]
    texts = [make_ids(n, seed=10 + i).tolist() for i, n in enumerate(text_lengths)]
    prefix = ours.project(ours.qformer_features(ours.image_features(pixel_values)))
    logprobs = ours.text_logprobs([prefix[i] for i in image_of_row], prompts, texts)
    for image, prompt, text, logprob in zip(image_of_row, prompts, texts, logprobs, strict=True):
        if language == "opt":
            input_ids, labels = [*prompt, *text], [-100] * len(prompt) + text
        else:
            input_ids, labels = prompt, text
        expected = reference_loss(
            theirs, pixel_values[image : image + 1], torch.tensor([input_ids]), torch.tensor([labels])
        )
        assert logprob.shape == (len(text),)
        torch.testing.assert_close(-logprob.mean(), expected, rtol=0, atol=1e-4)
