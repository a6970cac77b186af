"""Scores and features from the engine equal the reference, and share one pass of the encoders."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import Blip2Model

from blip2_actor import Engine, GenerationOptions, Request, Status
from blip2_actor.testing import EOS_TOKEN_ID, IMAGE_TOKEN_ID, NUM_QUERIES, random_images, tiny_tokenizer
from tests.engines import cpu_config

LANGUAGES = ["opt", "t5"]


@pytest.fixture(scope="module", params=LANGUAGES)
def language(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def engine(checkpoint_folder: Callable[..., Path], language: str) -> Iterator[Engine]:
    config = cpu_config(checkpoint_folder(language))
    with Engine(config) as started:
        yield started


@torch.no_grad()
def test_scores_are_the_references_loss_per_row(engine, reference, language) -> None:
    """Texts and prompts of several lengths in one call; padding would change every score."""
    model = reference(language)
    texts = ["a cat", "été", "two dogs on a sofa"]
    prompts = [None, "Question: who? Answer:", None]
    pictures = random_images(3)
    scores = engine.score([p.numpy() for p in pictures], texts, prompts)
    pixel_values = engine.model.normalizer(pictures, torch.float32)
    for row, (text, prompt, score) in enumerate(zip(texts, prompts, scores, strict=True)):
        tokenizer = tiny_tokenizer(language)
        start = tokenizer(prompt).input_ids if prompt else [2 if language == "opt" else EOS_TOKEN_ID]
        text_ids = [*tokenizer(text, add_special_tokens=False).input_ids, EOS_TOKEN_ID]
        if language == "opt":
            ids = [IMAGE_TOKEN_ID] * NUM_QUERIES + start + text_ids
            labels = [-100] * (NUM_QUERIES + len(start)) + text_ids
        else:
            ids, labels = [IMAGE_TOKEN_ID] * NUM_QUERIES + start, text_ids
        loss = model(
            pixel_values=pixel_values[row : row + 1],
            input_ids=torch.tensor([ids]),
            labels=torch.tensor([labels]),
        ).loss
        assert score.num_tokens == len(text_ids)
        assert score.loss == pytest.approx(loss.item(), abs=1e-4)


@torch.no_grad()
def test_features_equal_the_references(engine, reference, language) -> None:
    pictures = random_images(3)
    expected = reference(language).get_image_features(engine.model.normalizer(pictures, torch.float32))
    found = engine.features([p.numpy() for p in pictures], with_image_embeds=True)
    for row, features in enumerate(found):
        vision, qformer = (
            expected.vision_outputs.last_hidden_state,
            expected.qformer_outputs.last_hidden_state,
        )
        pooler_output = expected.vision_outputs.pooler_output[row]
        assert_close(torch.from_numpy(features.pooler_output), pooler_output, atol=1e-5, rtol=1e-5)
        assert_close(torch.from_numpy(features.image_embeds), vision[row], atol=1e-5, rtol=1e-5)
        assert_close(torch.from_numpy(features.qformer_features), qformer[row], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_text_features_equal_the_references(engine, checkpoint_folder, language) -> None:
    """Texts of several lengths in one call, through the checkpoint's own tokenizer."""
    model = Blip2Model.from_pretrained(checkpoint_folder(language)).eval()
    texts = ["a cat", "été", "two dogs on a sofa"]
    for text, found in zip(texts, engine.text_features(texts), strict=True):
        token_ids = torch.tensor([tiny_tokenizer(language)(text).input_ids])
        expected = model.get_text_features(token_ids).last_hidden_state[0]
        assert_close(torch.from_numpy(found.features), expected, atol=1e-5, rtol=1e-5)


def test_the_score_of_a_generated_text_is_its_logprob(engine, language) -> None:
    """Slots and teacher forcing, two ways through the model, must agree on the same tokens."""
    shared = engine.image(random_images(1)[0].numpy())
    result = engine.generate([Request(image=shared)], GenerationOptions(max_new_tokens=9))[0]
    rows = [(shared, engine.prompts.encode(None), list(result.token_ids))]
    assert sum(engine._core.runner.text_logprobs(rows)[0]) == pytest.approx(result.logprob, abs=1e-3)


def test_captions_scores_and_features_of_an_image_need_one_pass(engine) -> None:
    shared = engine.image(random_images(1, 7)[0].numpy())
    before = engine.stats().num_images_encoded
    engine.generate([Request(image=shared, prompt=p) for p in (None, "what?", "who?")])
    engine.score([shared, shared], ["a cat", "a dog"])
    engine.features([shared])
    assert engine.stats().num_images_encoded == before + 1


def test_an_image_of_low_priority_waits_with_the_batch_work(engine, monkeypatch) -> None:
    """Features of a batch job used to be encoded before the images of other callers."""
    added: list[bool] = []
    add = engine._core.scheduler.add

    def note(request) -> None:
        added.append(request.low_priority)
        add(request)

    monkeypatch.setattr(engine._core.scheduler, "add", note)
    low, usual = (engine.image(image.numpy()) for image in random_images(2, 8))
    low.low_priority = True
    engine.features([low, usual])
    engine.score([low], ["a cat"])
    assert added == [True, False, True]


def test_bad_images_and_texts_are_entries_with_a_status(engine) -> None:
    good = random_images(1)[0].numpy()
    scores = engine.score([good, b"junk", good], ["a", "a", ""])
    assert [s.status for s in scores] == [Status.OK, Status.UNDECODABLE, Status.REFUSED]
    assert engine.features([b"junk"])[0].status is Status.UNDECODABLE
    texts = engine.text_features(["", "a", "<image>", "a" * 97])
    assert texts[0].status is texts[2].status is Status.REFUSED
    assert texts[1].features is not None
    has_limit = engine.model.language_model.max_positions is not None
    assert texts[3].status is (Status.REFUSED if has_limit else Status.OK)
    assert np.isfinite(scores[0].logprob)
    with pytest.raises(ValueError, match=r"one per image \(1\), got 2; "):
        engine.score([good], ["a", "b"])


def test_text_features_that_are_not_finite_fail(engine, monkeypatch) -> None:
    """These used to be ok, unlike features of images and scores."""

    def overflows(texts: list[torch.Tensor], recorder: object) -> list[torch.Tensor]:
        return [torch.full((len(text), 4), torch.inf if i == 0 else 1.0) for i, text in enumerate(texts)]

    monkeypatch.setattr(engine._core.runner, "text_features", overflows)
    spoiled, good = engine.text_features(["a", "b"])
    assert (spoiled.status, spoiled.features, good.status) == (Status.FAILED, None, Status.OK)
    assert "NaN or infinity" in spoiled.error


def test_scores_are_computed_between_steps_and_fail_alone(engine, monkeypatch) -> None:
    """In the caller's thread they would run during a decode step, on the same device and with other thread
    counts."""
    pictures = [image.numpy() for image in random_images(2)]
    seen = []

    def fails(rows: object, recorder: object) -> None:
        seen.append(threading.current_thread().name)
        raise torch.OutOfMemoryError("one text alone does not fit")

    with monkeypatch.context() as patch:
        patch.setattr(engine._core.runner, "text_logprobs", fails)
        running = engine.submit(Request(image=pictures[0]), GenerationOptions(max_new_tokens=20))
        with pytest.raises(torch.OutOfMemoryError, match="one text alone"):
            engine.score(pictures, ["a", "b"])
    assert seen == ["blip2-engine"]
    assert running.result().ok
    assert engine.score(pictures, ["a", "b"])[1].logprob is not None
