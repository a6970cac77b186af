"""A model that is trained and saved here is the same model for transformers and for the engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from blip2_actor import EngineConfig, load_for_training, load_retrieval_for_training, save_model
from blip2_actor.models import layers
from blip2_actor.models.layers import pack_for_cpu
from blip2_actor.testing import (
    IMAGE_SIZE_PX,
    IMAGE_TOKEN_ID,
    NUM_QUERIES,
    random_images,
    save_tiny_retrieval_checkpoint,
)
from tests.parity.checkpoints.edited_checkpoint import copy_with

TOKEN_IDS = torch.randint(5, 260, (2, 6), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("language", ["opt", "t5", "t5 that scales"])
def test_a_trained_model_is_the_same_for_transformers(
    language: str, checkpoint_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """A T5 that scales its logits and has its own head used to be saved as one that does not scale them."""
    folder = checkpoint_folder(language.partition(" ")[0])
    if language == "t5 that scales":
        config = json.loads((folder / "config.json").read_text())
        for name in ("scale_decoder_outputs", "tie_word_embeddings"):
            config["text_config"].pop(name, None)
        folder = copy_with(folder, tmp_path / "base", {"config.json": config})
    model = load_for_training(folder, device="cpu")
    pixel_values = torch.randn(2, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before, _ = model(pixel_values, TOKEN_IDS, TOKEN_IDS)
    before.backward()
    optimizer.step()
    save_model(model, tmp_path / "trained", like=folder)
    saved = json.loads((tmp_path / "trained" / "config.json").read_text())
    for part in (saved, saved["text_config"]):
        # Other programs and older versions of transformers rely on it, and would lose a separate head.
        assert (part.get("tie_word_embeddings") is False) == (language != "opt")
    with torch.no_grad():
        loss, _ = model(pixel_values, TOKEN_IDS, TOKEN_IDS)
        assert loss < before - 0.01, "the step must have changed what is saved"
        theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "trained").eval()
        image_ids = torch.full((2, NUM_QUERIES), IMAGE_TOKEN_ID)
        labels = TOKEN_IDS
        if language == "opt":
            labels = torch.cat([torch.full_like(image_ids, -100), TOKEN_IDS], dim=1)
        input_ids = torch.cat([image_ids, TOKEN_IDS], dim=1)
        expected = theirs(pixel_values, input_ids=input_ids, labels=labels).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    same = Blip2ForConditionalGeneration.from_pretrained(folder).state_dict().keys()
    assert theirs.state_dict().keys() == same
    assert AutoTokenizer.from_pretrained(tmp_path / "trained")("a cat").input_ids
    assert {path.name for path in tmp_path.iterdir()} - {"base"} == {"trained"}


def test_a_trained_retrieval_model_is_the_same_for_transformers(tmp_path: Path) -> None:
    folder = save_tiny_retrieval_checkpoint(tmp_path / "base")
    model = load_retrieval_for_training(folder, device="cpu")
    pixel_values = torch.randn(2, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX)
    texts = list(TOKEN_IDS)
    before = model.matching_logits(model.image_features(pixel_values), texts)
    torch.nn.functional.cross_entropy(before, torch.tensor([1, 0])).backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    save_model(model, tmp_path / "trained", like=folder)
    theirs = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "trained").eval()
    inputs = {"pixel_values": pixel_values, "input_ids": TOKEN_IDS, "attention_mask": TOKEN_IDS > 0}
    with torch.no_grad():
        image = model.image_features(pixel_values)
        matching = theirs(**inputs, use_image_text_matching_head=True).logits_per_image
        contrastive = theirs(**inputs, use_image_text_matching_head=False).logits_per_image.diagonal()
        after = model.matching_logits(image, texts)
        ours = model.contrastive_scores(model.image_embeddings(image), model.text_embeddings(texts))
    assert (after - before).abs().max() > 0.01, "the step must have changed what is saved"
    torch.testing.assert_close(after, matching, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours, contrastive, atol=1e-4, rtol=1e-4)
    same = Blip2ForImageTextRetrieval.from_pretrained(folder).state_dict().keys()
    assert theirs.state_dict().keys() == same
    assert AutoTokenizer.from_pretrained(tmp_path / "trained")("a cat").input_ids


def test_an_untrained_model_gives_the_same_captions_in_a_smaller_dtype(
    checkpoint_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """The configuration must state the dtype of the file, or transformers converts the weights back."""
    folder = checkpoint_folder("opt")
    save_model(load_for_training(folder, device="cpu", dtype="bfloat16"), tmp_path / "half", like=folder)
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "half", dtype="auto")
    assert theirs.dtype is torch.bfloat16
    pictures = [image.numpy() for image in random_images(2)]

    def captions(model: Path) -> list[tuple[int, ...]]:
        config = EngineConfig(
            model=str(model), device="cpu", dtype="bfloat16", num_threads=1, skip_self_test=True
        )
        with config.build() as engine:
            return [result.token_ids for result in engine.generate(pictures, max_new_tokens=5)]

    assert captions(tmp_path / "half") == captions(folder)


def test_what_cannot_be_saved_is_refused_and_leaves_nothing(
    checkpoint_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt, t5 = checkpoint_folder("opt"), checkpoint_folder("t5")
    model = load_for_training(opt, device="cpu")
    with pytest.raises(FileExistsError, match="folder must be new or empty"):
        save_model(model, opt, like=opt)
    with pytest.raises(ValueError, match="must have the weights of the checkpoint, but lacks"):
        save_model(model, tmp_path / "a", like=t5)
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"no other weights than the checkpoint, got extra\.weight"):
        save_model(model, tmp_path / "a", like=opt)
    del model.extra
    monkeypatch.setattr(layers, "SMALL_WEIGHT", 0)  # a small layer keeps its weight
    pack_for_cpu(model.requires_grad_(False))
    with pytest.raises(ValueError, match="neither packed nor quantized"):
        save_model(model, tmp_path / "a", like=opt)
    assert not list(tmp_path.iterdir())
