"""Image-text matching and contrastive scores against `Blip2ForImageTextRetrieval`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Blip2ForImageTextRetrieval

from blip2_actor.checkpoints.checkpoint import Checkpoint
from blip2_actor.checkpoints.loading import load_model, load_retrieval
from blip2_actor.models.retrieval import Blip2Retrieval
from blip2_actor.testing import IMAGE_SIZE_PX, save_tiny_retrieval_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_retrieval_checkpoint(tmp_path_factory.mktemp("retrieval"))


@pytest.fixture(scope="module")
def models(folder: Path) -> tuple[Blip2Retrieval, Blip2ForImageTextRetrieval]:
    ours = load_retrieval(Checkpoint(folder), CPU, torch.float32)
    return ours, Blip2ForImageTextRetrieval.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randint(5, 260, (n,), generator=generator) for n in (6, 3, 11)]


@torch.no_grad()
def test_scores_equal_the_reference(
    models: tuple[Blip2Retrieval, Blip2ForImageTextRetrieval], texts: list[Tensor]
) -> None:
    """A text that attended to its padding, or an image without its queries, would change every score."""
    ours, theirs = models
    pixel_values = torch.randn(3, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX, generator=torch.Generator().manual_seed(5))
    image_embeds = ours.image_features(pixel_values)
    inputs = {
        "pixel_values": pixel_values,
        "input_ids": pad_sequence(texts, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(text) for text in texts], batch_first=True),
    }
    matching = theirs(**inputs, use_image_text_matching_head=True).logits_per_image
    torch.testing.assert_close(ours.matching_logits(image_embeds, texts), matching, rtol=1e-4, atol=1e-4)

    expected = theirs(**inputs, use_image_text_matching_head=False)
    image_embeddings, text_embeddings = ours.image_embeddings(image_embeds), ours.text_embeddings(texts)
    torch.testing.assert_close(image_embeddings, expected.image_embeds, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(text_embeddings, expected.text_embeds, rtol=1e-4, atol=1e-4)
    scores = ours.contrastive_scores(image_embeddings, text_embeddings)
    torch.testing.assert_close(scores, expected.logits_per_image.diagonal(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_scores_do_not_depend_on_other_rows(
    models: tuple[Blip2Retrieval, Blip2ForImageTextRetrieval], texts: list[Tensor]
) -> None:
    """A short text has the same score alone and padded next to a long one."""
    ours, _ = models
    image_embeds = torch.randn(3, 17, 24, generator=torch.Generator().manual_seed(5))
    together = ours.matching_logits(image_embeds, texts)
    for i, text in enumerate(texts):
        alone = ours.matching_logits(image_embeds[i : i + 1], [text])[0]
        torch.testing.assert_close(together[i], alone, rtol=1e-5, atol=1e-5)


def test_each_loader_refuses_checkpoints_of_the_other_kind(
    folder: Path, checkpoint_folder: Callable[..., Path]
) -> None:
    """The architecture is checked first: a list of hundreds of unexpected tensors would be less clear."""
    with pytest.raises(ValueError, match="must have a language model, got Blip2ForImageTextRetrieval"):
        load_model(Checkpoint(folder), CPU, torch.float32)
    with pytest.raises(ValueError, match="must be a Blip2ForImageTextRetrieval"):
        load_retrieval(Checkpoint(checkpoint_folder("opt")), CPU, torch.float32)


def test_a_text_that_is_too_long_is_refused(
    models: tuple[Blip2Retrieval, Blip2ForImageTextRetrieval],
) -> None:
    with pytest.raises(ValueError, match="text must be at most 64 tokens, got 65"):
        models[0].text_embeddings([torch.ones(65, dtype=torch.int64)])


@torch.no_grad()
def test_float16_keeps_the_qformer_in_float32(folder: Path, texts: list[Tensor], models) -> None:
    """As in the reference. A missing conversion between the dtypes raises."""
    ours, exact = load_retrieval(Checkpoint(folder), CPU, torch.float16), models[0]
    assert ours.qformer.layernorm.weight.dtype is torch.float32
    pixel_values = torch.randn(3, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX, generator=torch.Generator().manual_seed(5))
    embeds, exact_embeds = ours.image_features(pixel_values.half()), exact.image_features(pixel_values)
    for result, expected in (
        (ours.matching_logits(embeds, texts), exact.matching_logits(exact_embeds, texts)),
        (ours.image_embeddings(embeds), exact.image_embeddings(exact_embeds)),
        (ours.text_embeddings(texts), exact.text_embeddings(texts)),
    ):
        assert result.dtype is torch.float16
        torch.testing.assert_close(result.float(), expected, rtol=0.02, atol=0.02)
