"""The engine of retrieval checkpoints against `Blip2ForImageTextRetrieval` with its own processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Blip2ForImageTextRetrieval, Blip2Processor

from blip2_actor import EngineConfig, MatchingConfig, MatchingEngine, Status
from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.testing import IMAGE_SIZE_PX, NUM_QUERIES, random_images, save_tiny_retrieval_checkpoint

TEXTS = ["a dog", "Two cats on the sofa", "a cat"]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "image-token"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both layouts of the processor: without image tokens, and with image tokens before the text."""
    return save_tiny_retrieval_checkpoint(tmp_path_factory.mktemp("matching"), request.param)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[MatchingEngine]:
    with MatchingConfig(model=str(folder), device="cpu", dtype="float32", num_threads=1).build() as built:
        yield built


@torch.no_grad()
def test_scores_and_embeddings_equal_the_references(engine: MatchingEngine, folder: Path) -> None:
    """Each pair runs alone through the reference and its processor: one more token would change every
    score."""
    model, processor = (
        Blip2ForImageTextRetrieval.from_pretrained(folder).eval(),
        Blip2Processor.from_pretrained(folder),
    )
    pictures = random_images(3).numpy()
    matches = engine.score(pictures, TEXTS)
    image_vectors, text_vectors = engine.image_embeddings(pictures), engine.text_embeddings(TEXTS)
    rows = zip(pictures, TEXTS, matches, image_vectors, text_vectors, strict=True)
    for picture, text, match, of_image, of_text in rows:
        inputs = processor(images=Image.fromarray(picture), text=text, return_tensors="pt")
        itm = model(**inputs, use_image_text_matching_head=True).logits_per_image
        itc = model(**inputs, use_image_text_matching_head=False)
        assert match.itm == pytest.approx(itm.softmax(dim=1)[0, 1].item(), abs=1e-5)
        assert match.itc == pytest.approx(itc.logits_per_image.item(), abs=1e-5)
        assert of_image.vectors is not None and of_text.vectors is not None
        np.testing.assert_allclose(of_image.vectors, itc.image_embeds[0], atol=1e-5)
        np.testing.assert_allclose(of_text.vectors, itc.text_embeds, atol=1e-5)
        assert (of_image.vectors @ of_text.vectors.T).max() == pytest.approx(match.itc, abs=1e-5)
    assert len({match.itm for match in matches}) == len({match.itc for match in matches}) == 3


def count_encoded(engine: MatchingEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the size of each batch that goes through the vision encoder from now on."""
    sizes: list[int] = []
    real = engine.model.image_features

    def image_features(pixel_values: torch.Tensor) -> torch.Tensor:
        sizes.append(len(pixel_values))
        return real(pixel_values)

    monkeypatch.setattr(engine.model, "image_features", image_features)
    return sizes


def test_an_image_given_for_several_texts_is_encoded_once(
    engine: MatchingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filter scores each caption with its image, and the vision encoder is nearly all of the cost."""
    first, second = (image.numpy() for image in random_images(2))
    asked = [(first, TEXTS[0]), (second, TEXTS[1]), (first, TEXTS[2]), (first, TEXTS[1])]
    alone = [engine.score([image], [text])[0] for image, text in asked]
    sizes = count_encoded(engine, monkeypatch)
    monkeypatch.setattr(engine._text_batches, "size", 2)
    together = engine.score(*zip(*asked, strict=True))
    assert sizes == [2]
    for found, expected in zip(together, alone, strict=True):
        assert (found.itm, found.itc) == pytest.approx((expected.itm, expected.itc), abs=1e-5)


def test_bad_images_and_texts_are_entries_with_a_status(engine: MatchingEngine) -> None:
    good = random_images(1)[0].numpy()
    long = "a dog " * 40
    matches = engine.score([good, b"junk", good, good], ["a dog", "a dog", "", long])
    assert [m.status for m in matches] == [Status.OK, Status.UNDECODABLE, Status.REFUSED, Status.REFUSED]
    assert "at most 64 tokens, got 82" in str(matches[3].error)
    in_vocabulary = engine.model.config.image_token_index is None  # otherwise it is a word like any other
    status = Status.OK if in_vocabulary else Status.REFUSED
    assert engine.score([good], ["a <image>"])[0].status is status
    assert engine.image_embeddings([b"junk", good])[0].status is Status.UNDECODABLE
    assert [e.status for e in engine.text_embeddings(["", "a dog"])] == [Status.REFUSED, Status.OK]
    foreign = engine.score([EncodedImage(good, object())], ["a dog"])[0]
    assert (foreign.status, "another engine" in str(foreign.error)) == (Status.REFUSED, True)
    assert engine.score([], []) == []
    with pytest.raises(ValueError, match=r"one per image \(1\), got 2"):
        engine.score([good], ["a", "b"])


def test_out_of_memory_halves_the_batch_and_loses_nothing(
    engine: MatchingEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [image.numpy() for image in random_images(5)]
    expected = engine.score(pictures, ["a dog"] * 5)
    real = engine.model.image_features

    def small_device(pixel_values: torch.Tensor) -> torch.Tensor:
        if len(pixel_values) > 2:
            raise torch.OutOfMemoryError("too many")
        return real(pixel_values)

    monkeypatch.setattr(engine.model, "image_features", small_device)
    monkeypatch.setattr(engine._image_batches, "size", 8)
    before = engine.stats().num_images_encoded
    found = engine.score(pictures, ["a dog"] * 5)
    assert engine.stats().num_images_encoded == before + 5
    assert engine._image_batches.size == 2
    assert [m.itm for m in found] == pytest.approx([m.itm for m in expected], abs=1e-5)


def test_callers_of_several_threads_get_their_own_scores(engine: MatchingEngine) -> None:
    pictures = [image.numpy() for image in random_images(6)]
    expected = [engine.score([picture], ["a cat"])[0].itc for picture in pictures]
    with ThreadPoolExecutor(6) as pool:
        found = pool.map(lambda picture: engine.score([picture], ["a cat"])[0].itc, pictures)
    assert list(found) == pytest.approx(expected, abs=1e-5)


def test_each_config_refuses_the_others_checkpoint(
    folder: Path, checkpoint_folder: Callable[..., Path]
) -> None:
    """The engine refuses before it loads anything, and names the configuration that fits."""
    with pytest.raises(ValueError, match=r"must have a language model.*as score_model.*MatchingConfig"):
        EngineConfig(model=str(folder)).info()
    with pytest.raises(
        ValueError, match=r"must be a Blip2For\w+, got Blip2For.*without score_model.*EngineConfig"
    ):
        MatchingConfig(model=str(checkpoint_folder("opt"))).info()
    info = MatchingConfig(model=str(folder)).info()
    assert (info.image_size_px, info.vision_width, info.qformer_width) == (IMAGE_SIZE_PX, 24, 16)
    assert info.num_queries == NUM_QUERIES


def test_vectors_that_are_not_finite_fail(engine: MatchingEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such vectors used to be ok, although a search over an index with them finds nothing or fails."""
    spoiled = random_images(2).numpy()
    monkeypatch.setattr(engine.model.vision_projection, "forward", spoil_first)
    monkeypatch.setattr(engine.model.text_projection, "forward", spoil_first)
    for found in (engine.image_embeddings(spoiled), engine.text_embeddings(TEXTS[:2])):
        assert [(one.status, one.vectors is None) for one in found] == [
            (Status.FAILED, True),
            (Status.OK, False),
        ]
        assert "NaN or infinity" in str(found[0].error)


def spoil_first(hidden: torch.Tensor) -> torch.Tensor:
    vectors = torch.ones_like(hidden)
    vectors[0] = float("inf")
    return vectors
