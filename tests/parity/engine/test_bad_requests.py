"""A request that cannot be served fails alone: its neighbours get their texts, and the engine goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from blip2_actor import Engine, EngineConfig, GenerationOptions, Request, Result, Status
from blip2_actor.engine.request_state import EncodedImage
from blip2_actor.testing.tiny_checkpoints import images

GOOD = images(1)[0].numpy()


@pytest.fixture(scope="module", params=["opt", "t5"])
def engine(request: pytest.FixtureRequest, checkpoint_folder: Callable[..., Path]) -> Iterator[Engine]:
    config = EngineConfig(
        model=str(checkpoint_folder(request.param)), dtype="float32", device="cpu", num_threads=1, max_slots=8
    )
    with config.build() as started:
        yield started


def beside_a_good_one(engine: Engine, bad: Request) -> Result:
    """What becomes of a request, once its neighbour has been found unharmed."""
    good = Request(image=GOOD, options=GenerationOptions(max_new_tokens=4))
    alone = engine.generate([good])[0]
    result, neighbour = engine.generate([bad, good], GenerationOptions(max_new_tokens=4))
    assert neighbour == alone
    return result


@pytest.mark.parametrize(
    "prompt",
    [5, b"x", ["a", "b"], "\ud800", "a <image> b"],
    ids=["number", "bytes", "list", "half a character", "image token"],
)
def test_a_prompt_that_is_no_text_is_refused(engine: Engine, prompt: object) -> None:
    """A list of texts gives a list of lists of ids, which would end the whole engine in its next step."""
    result = beside_a_good_one(engine, Request(image=GOOD, prompt=prompt))  # type: ignore[arg-type]
    assert result.status is Status.REFUSED
    assert "text must" in result.error
    assert engine.score([GOOD], [prompt])[0].status is Status.REFUSED
    assert engine.text_features([prompt])[0].status is Status.REFUSED


@pytest.mark.parametrize("language", ["opt", "t5"])
def test_prompts_are_checked_before_anything_is_loaded(
    language: str, checkpoint_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(model=str(checkpoint_folder(language)), device="cpu")
    monkeypatch.setattr(
        "blip2_actor.checkpoints.weights.list_tensors", lambda path: pytest.fail("weights were read")
    )
    config.check_prompts(["what is it?", ""], 30)
    with pytest.raises(ValueError, match="must not contain the image token"):
        config.check_prompts(["what?", "a <image>"], 30)
    if language == "opt":
        with pytest.raises(ValueError, match=r"together must have at most 91 tokens .*, got 92"):
            config.check_prompts(["x" * 61], 30)
        config.check_prompts(["x" * 60], 30)


@pytest.mark.parametrize(
    "image",
    [
        None,
        "a.jpg",
        b"",
        [1, 2],
        np.zeros((4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        torch.zeros(4, 4, 3),
    ],
    ids=["None", "a path", "no bytes", "a list", "grey", "no pixels", "a tensor"],
)
def test_an_image_that_is_none_has_a_status(engine: Engine, image: object) -> None:
    result = beside_a_good_one(engine, Request(image=image))  # type: ignore[arg-type]
    assert result.status in (Status.UNDECODABLE, Status.MISSING_IMAGE)
    assert "image" in result.error


def test_an_image_that_another_engine_has_encoded_is_refused(engine: Engine) -> None:
    """Its tensors are another model's: another caption, or a shape that ends everybody's requests."""
    foreign = EncodedImage(GOOD, object(), prefix=torch.zeros(3, 7))
    result = beside_a_good_one(engine, Request(image=foreign))
    assert result.status is Status.REFUSED
    assert "another engine" in result.error
    assert engine.score([foreign], ["a"])[0].status is Status.REFUSED
    assert engine.features([foreign])[0].status is Status.REFUSED
    with pytest.raises(ValueError, match="another engine"):
        engine.image(foreign)
    own = engine.image(GOOD)
    assert engine.image(own) is own


def test_a_token_that_was_added_to_the_tokenizer_alone_is_refused(engine: Engine) -> None:
    """The embeddings have no row for it, which a GPU finds out in the middle of everybody's batch."""
    engine.prompts.tokenizer.add_tokens([f"<new{i}>" for i in range(8)])
    result = beside_a_good_one(engine, Request(image=GOOD, prompt="a <new7>"))
    assert result.status is Status.REFUSED
    assert "only tokens that the model knows (0 to 263), got token 268" in result.error
    assert engine.score([GOOD], ["a <new7>"])[0].status is Status.REFUSED


def test_a_text_that_would_leave_few_slots_is_refused(
    checkpoint_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prompt of a T5, which has no last position, would take everybody's slots for good."""
    monkeypatch.setattr("blip2_actor.engine.memory.free_bytes", lambda _: 8 << 20)
    config = EngineConfig(
        model=str(checkpoint_folder("t5")),
        dtype="float32",
        device="cpu",
        num_threads=1,
        max_slots=64,
        encode_batch=4,
    )
    with config.build() as engine:
        limit = engine._input_processor.max_slot_positions
        assert 8 * limit * engine._runner._position_bytes < 4 << 20
        assert limit < engine._input_processor.max_positions
        room = limit - engine.model.config.num_query_tokens - 1
        fits, exceeds = (
            engine.generate([Request(image=GOOD, options=GenerationOptions(max_new_tokens=n))])[0]
            for n in (room, room + 1)
        )
        assert fits.ok
        assert exceeds.status is Status.REFUSED
        assert f"must have at most {room + 1} tokens" in exceeds.error
        assert "lower max_slots" in exceeds.error


def test_a_text_longer_than_memory_is_refused(engine: Engine) -> None:
    """T5 has no positions to run out of: a billion tokens would be asked of the allocator, for all slots."""
    endless = Request(image=GOOD, options=GenerationOptions(max_new_tokens=10**9))
    assert beside_a_good_one(engine, endless).status is Status.REFUSED
    assert engine.score([GOOD], ["a" * 200_000])[0].status is Status.REFUSED


def test_a_text_that_does_not_fit_beside_others_gets_fewer_slots_and_one_that_never_fits_fails(
    checkpoint_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU nobody says that memory ends, until the process does."""
    config = EngineConfig(
        model=str(checkpoint_folder("t5")), dtype="float32", device="cpu", num_threads=1, max_slots=8
    )
    with config.build() as engine:
        position = engine._runner._position_bytes
        monkeypatch.setattr("blip2_actor.engine.model_runner.free_bytes", lambda _: position * 8 * 100)
        short, long, endless = (
            Request(image=GOOD, options=GenerationOptions(max_new_tokens=n, min_new_tokens=n))
            for n in (10, 120, 1000)
        )
        results = engine.generate([short, long, endless, short])
        assert [r.status for r in results] == [Status.OK, Status.OK, Status.FAILED, Status.OK]
        assert len(results[1].token_ids) == 120
        assert results[3] == results[0]
        assert "out of memory" in results[2].error
        assert engine._scheduler.max_slots == 1


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True}, {"num_beams": 2}, {"repetition_penalty": 1.5}], ids=str
)
def test_scores_that_are_no_numbers_are_a_failure(
    engine: Engine, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16 overflows on some image: the first token of NaN is no caption, and drawing from NaN raises."""
    real = engine._runner.prefill

    def overflow(jobs: list, slots: list[int]) -> torch.Tensor:
        logits = real(jobs, slots).clone()
        poisoned = [row for row, job in enumerate(jobs) if job.options.max_new_tokens == 7]
        logits[poisoned] = torch.nan
        return logits

    monkeypatch.setattr(engine._runner, "prefill", overflow)
    chosen = GenerationOptions(max_new_tokens=7, **options)
    result = beside_a_good_one(engine, Request(image=GOOD, options=chosen))
    assert result.status is Status.FAILED
    assert "no number" in result.error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 5.5}, "max_new_tokens must be a whole number"),
        ({"num_beams": True}, "num_beams must be a whole number"),
        ({"temperature": 1e-40, "do_sample": True}, "temperature must be from 1e-06"),
        ({"temperature": float("nan"), "do_sample": True}, "temperature must be"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be from 0.001 to 1000"),
        ({"length_penalty": 1e10, "num_beams": 2}, "length_penalty must be from -50 to 50"),
        ({"seed": -1, "do_sample": True}, "seed must be at least 0"),
        ({"seed": 1 << 64, "do_sample": True}, "seed must be below"),
        ({"stop": (5,)}, "stop must be texts"),
    ],
)
def test_options_beyond_what_floats_hold_are_refused(options: dict, message: str) -> None:
    """Each of them would raise, or draw from NaN, in the middle of everybody's batch."""
    with pytest.raises(ValueError, match=message):
        GenerationOptions(**options)
