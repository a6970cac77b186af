"""A request that cannot be served fails alone: the others get their texts, and the engine continues."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blip2_actor import Engine, EngineConfig, GenerationOptions, Request, Result, Status
from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.request_state import RequestState
from blip2_actor.testing import random_images
from tests.engines import cpu_config

GOOD = random_images(1)[0].numpy()


@pytest.fixture(scope="module", params=["opt", "t5"])
def engine(request: pytest.FixtureRequest, checkpoint_folder: Callable[..., Path]) -> Iterator[Engine]:
    config = cpu_config(checkpoint_folder(request.param), max_slots=8)
    with config.build() as started:
        yield started


def assert_same_text(found: Result, expected: Result) -> None:
    """A step with other texts may use another matrix product, whose log-probabilities round differently."""
    assert (found.status, found.token_ids) == (expected.status, expected.token_ids)
    assert found.logprob == pytest.approx(expected.logprob, abs=1e-4)


def next_to_a_good_one(engine: Engine, bad: Request) -> Result:
    """Return the result of a bad request, after checking that the request next to it is not affected."""
    good = Request(image=GOOD, options=GenerationOptions(max_new_tokens=4))
    alone = engine.generate([good])[0]
    result, other = engine.generate([bad, good], GenerationOptions(max_new_tokens=4))
    assert_same_text(other, alone)
    return result


def test_equal_options_are_resolved_once_and_bad_ones_each_time(engine: Engine) -> None:
    resolve = engine._input_processor.resolve
    once, again, other = (resolve(GenerationOptions(max_new_tokens=number)) for number in (4, 4, 5))
    assert once is again and once.num_beams == 1 and other.max_new_tokens == 5
    for _ in range(2):
        with pytest.raises(ValueError, match="temperature must be left"):
            resolve(GenerationOptions(temperature=0.7))


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1.5}, {"repetition_penalty": 1.5, "num_beams": 2}, {"no_repeat_ngram_size": 1}],
)
def test_an_image_token_beyond_the_vocabulary_has_no_logit(
    checkpoint_folder: Callable[..., Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    """The tokenizer has more tokens than the model: one request with a penalty used to end the engine."""
    folder = shutil.copytree(checkpoint_folder("opt", image_token=False), tmp_path / "model")
    config = cpu_config(folder)
    with config.build() as without:
        expected = without.generate(GOOD, **options)[0]
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | {"image_token_index": 9999}))
    with config.build() as engine:
        assert_same_text(engine.generate(GOOD, **options)[0], expected)


@pytest.mark.parametrize(
    "prompt",
    [5, b"x", ["a", "b"], "\ud800", "a <image> b"],
    ids=["number", "bytes", "list", "half a character", "image token"],
)
def test_a_prompt_that_is_not_text_is_refused(engine: Engine, prompt: Any) -> None:
    """A list of texts becomes a list of lists of ids, which would fail the next step of the whole engine."""
    result = next_to_a_good_one(engine, Request(image=GOOD, prompt=prompt))
    assert result.status is Status.REFUSED
    assert "text must" in str(result.error)
    assert engine.score([GOOD], [prompt])[0].status is Status.REFUSED
    assert engine.text_features([prompt])[0].status is Status.REFUSED


@pytest.mark.parametrize("language", ["opt", "t5"])
def test_prompts_are_checked_before_anything_is_loaded(
    language: str, checkpoint_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(model=str(checkpoint_folder(language)), device="cpu")
    monkeypatch.setattr(
        "blip2_actor.checkpoints.loading.list_weights",
        lambda folder: pytest.fail("weights were read"),
    )
    config.check_prompts(["what is it?", ""], 30)
    with pytest.raises(ValueError, match="must not contain the image token"):
        config.check_prompts(["what?", "a <image>"], 30)
    if language == "opt":
        with pytest.raises(ValueError, match=r"together must have at most 91 tokens .*, got 92"):
            config.check_prompts(["x" * 61], 30)
        config.check_prompts(["x" * 60], 30)


@pytest.mark.parametrize(
    ("image", "status"),
    [
        (None, Status.MISSING_IMAGE),
        (b"", Status.MISSING_IMAGE),
        (b"GIF89a", Status.UNDECODABLE),
        ([1, 2], Status.UNDECODABLE),
        (np.zeros((0, 4, 3), np.uint8), Status.UNDECODABLE),
        (torch.zeros(4, 4, 3), Status.UNDECODABLE),
    ],
    ids=["None", "no bytes", "damaged", "a list", "no pixels", "floats"],
)
def test_an_image_that_cannot_be_read_has_a_status(engine: Engine, image: Any, status: Status) -> None:
    result = next_to_a_good_one(engine, Request(image=image))
    assert result.status is status
    assert result.error
    assert engine.score([image], ["a"])[0].status is result.status
    assert engine.features([image])[0].status is result.status


def test_an_image_that_another_engine_has_encoded_is_refused(engine: Engine) -> None:
    """They are tensors of another model: they give a wrong caption, or a shape that fails every request."""
    foreign = EncodedImage(GOOD, object(), prefix=torch.zeros(3, 7))
    result = next_to_a_good_one(engine, Request(image=foreign))
    assert result.status is Status.REFUSED
    assert "another engine" in str(result.error)
    assert engine.score([foreign], ["a"])[0].status is Status.REFUSED
    assert engine.features([foreign])[0].status is Status.REFUSED
    with pytest.raises(ValueError, match="another engine"):
        engine.image(foreign)
    own = engine.image(GOOD)
    assert engine.image(own) is own


def test_a_token_that_was_added_to_the_tokenizer_alone_is_refused(engine: Engine) -> None:
    """The embeddings have no row for it; on a GPU the whole batch would fail."""
    engine.prompts.tokenizer.add_tokens([f"<new{i}>" for i in range(8)])
    result = next_to_a_good_one(engine, Request(image=GOOD, prompt="a <new7>"))
    assert result.status is Status.REFUSED
    assert "only tokens that the model knows (0 to 263), got token 268" in str(result.error)
    assert engine.score([GOOD], ["a <new7>"])[0].status is Status.REFUSED


def test_a_text_that_would_leave_few_slots_is_refused(
    checkpoint_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """T5 has no maximum position: one prompt would permanently take the slots of all other requests."""
    monkeypatch.setattr("blip2_actor.engine.memory.free_bytes", lambda _: 8 << 20)
    config = cpu_config(checkpoint_folder("t5"), max_slots=64, encode_batch=4)
    with config.build() as engine:
        limit = engine._input_processor.max_positions_in_slots
        assert 8 * limit * engine._core.runner.position_bytes < 4 << 20
        assert limit < engine._input_processor.max_positions_read
        room = limit - engine.model.config.num_query_tokens - 1
        fits, exceeds = (
            engine.generate([Request(image=GOOD, options=GenerationOptions(max_new_tokens=n))])[0]
            for n in (room, room + 1)
        )
        assert fits.ok
        assert exceeds.status is Status.REFUSED
        assert f"must have at most {room + 1} tokens" in str(exceeds.error)
        assert "lower max_slots" in str(exceeds.error)


def test_a_text_longer_than_memory_is_refused(engine: Engine) -> None:
    """T5 has no maximum position: the allocator would be asked for a billion tokens in every slot."""
    endless = Request(image=GOOD, options=GenerationOptions(max_new_tokens=10**9))
    assert next_to_a_good_one(engine, endless).status is Status.REFUSED
    assert engine.score([GOOD], ["a" * 200_000])[0].status is Status.REFUSED


def test_a_text_that_does_not_fit_next_to_others_gets_fewer_slots_and_one_that_never_fits_fails(
    checkpoint_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, exhausted memory raises no error; the process is killed."""
    config = cpu_config(checkpoint_folder("t5"), max_slots=8)
    with config.build() as engine:
        position = engine._core.runner.position_bytes
        monkeypatch.setattr("blip2_actor.engine.model_runner.free_bytes", lambda _: position * 8 * 100)
        short, long, endless = (
            Request(image=GOOD, options=GenerationOptions(max_new_tokens=n, min_new_tokens=n))
            for n in (10, 120, 1000)
        )
        results = engine.generate([short, long, endless, short])
        assert [r.status for r in results] == [Status.OK, Status.OK, Status.FAILED, Status.OK]
        assert len(results[1].token_ids) == 120
        assert_same_text(results[3], results[0])
        assert "out of memory" in str(results[2].error)
        assert engine._core.scheduler.limits.max_slots == 1


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True}, {"num_beams": 2}, {"repetition_penalty": 1.5}], ids=str
)
def test_logits_of_nan_are_a_failure(engine: Engine, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 overflows on some images: the first token of NaN is not a caption, and drawing from NaN
    raises."""
    real = engine._core.runner.prefill

    def overflow(requests: list[RequestState], slots: list[int]) -> torch.Tensor:
        logits = real(requests, slots).clone()
        poisoned = [row for row, request in enumerate(requests) if request.options.max_new_tokens == 7]
        logits[poisoned] = torch.nan
        return logits

    monkeypatch.setattr(engine._core.runner, "prefill", overflow)
    chosen = GenerationOptions(max_new_tokens=7, **options)
    result = next_to_a_good_one(engine, Request(image=GOOD, options=chosen))
    assert result.status is Status.FAILED
    assert "NaN or infinity" in str(result.error)
