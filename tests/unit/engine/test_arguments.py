"""The engine's calls as users write them; wrong types are refused by the argument's name."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blip2_actor import (
    Blip2Actor,
    Engine,
    EngineConfig,
    FetchPolicy,
    GenerationOptions,
    MatchingConfig,
    Request,
    Result,
    Status,
)
from blip2_actor.testing import FakeEngineConfig
from tests.engines import cpu_config
from tests.unit.engine.random_calls import CALLS, call_at_random
from tests.unit.fetching.web_server import web_server
from tests.unit.preprocessing.image_corpus import encode

of_this_machine = partial(FetchPolicy, private_hosts=("127.0.0.1",))
"""The guard refuses a test's server like every private address."""
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def build(cls: Any, **fields: Any) -> Any:
    """Make a value with field types that mypy would reject."""
    return cls(**fields)


def png(pixels: np.ndarray = PIXELS) -> bytes:
    return encode(Image.fromarray(pixels), "PNG")


def told(results: list[Result]) -> list[tuple[Any, ...]]:
    """Return the fields that are equal in every batch; log-probabilities may differ in their last bits."""
    return [
        (result.status, result.error, [(c.token_ids, c.text, c.finish_reason) for c in result.completions])
        for result in results
    ]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    config = cpu_config("demo", max_slots=8, skip_self_test=True, allow_urls=True)
    with config.build() as started:
        yield started


@pytest.fixture(scope="module")
def expected(engine: Engine) -> Any:
    return engine.generate([Request(image=PIXELS)], GenerationOptions(max_new_tokens=5))


@pytest.mark.parametrize(
    "asked",
    [
        PIXELS,
        [PIXELS],
        PIXELS[None],
        Request(image=PIXELS),
        (Request(image=PIXELS),),
        png(),
        bytearray(png()),
        memoryview(png()),
        Image.fromarray(PIXELS),
        torch.from_numpy(PIXELS),
        torch.from_numpy(PIXELS).permute(2, 0, 1),
        torch.from_numpy(PIXELS).permute(2, 0, 1)[None],
    ],
    ids=lambda asked: f"{type(asked).__name__}{list(getattr(asked, 'shape', []))}",
)
def test_one_image_in_any_form_gives_a_list_of_one(engine: Engine, expected: Any, asked: Any) -> None:
    assert engine.generate(asked, max_new_tokens=5) == expected


def test_a_generator_and_an_empty_list(engine: Engine, expected: Any) -> None:
    assert told(engine.generate((PIXELS for _ in range(2)), max_new_tokens=5)) == told(expected * 2)
    assert engine.generate([]) == []


def test_a_file_is_read(engine: Engine, expected: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png())
    assert told(engine.generate([path, str(path)], max_new_tokens=5)) == told(expected * 2)
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate((128 << 20) + 1)
    bad: dict[Any, Status] = {
        tmp_path / "none": Status.UNREADABLE,
        tmp_path: Status.UNREADABLE,
        "/dev/zero": Status.UNREADABLE,
        "a\x00b": Status.UNREADABLE,
        big: Status.TOO_LARGE,
        "s3://bucket/a.png": Status.REFUSED,
        "data:image/png;base64,AAAA": Status.REFUSED,
        "": Status.UNREADABLE,
    }
    results = engine.generate(list(bad))
    assert [result.status for result in results] == list(bad.values())
    assert "No such file" in str(results[0].error)
    assert "got ''" in str(results[-1].error)


def test_an_array_of_texts_is_a_list(engine: Engine, expected: Any, tmp_path: Path) -> None:
    """It used to be read as one image of a wrong layout, or refused with the advice to use a list."""
    path = tmp_path / "a.png"
    path.write_bytes(png())
    paths: Any = np.array([str(path)] * 2)
    assert told(engine.generate(paths, max_new_tokens=5)) == told(expected * 2)
    assert [features.status for features in engine.features(paths)] == [Status.OK] * 2
    texts = ["a red circle", "a dog"]
    array: Any = np.array(texts)
    stack: Any = PIXELS[None].repeat(2, 0)
    scored = [engine.score(stack, given, given)[1].logprob for given in (texts, array)]
    assert scored[0] == pytest.approx(scored[1], abs=1e-4)
    assert [text.status for text in engine.text_features(array)] == [Status.OK] * 2


def test_ids_and_masks_may_be_one_array_or_tensor(engine: Engine) -> None:
    """A tokenizer returns these; the advice used to be to use a list, which was refused too."""
    ids, masks = [[70, 71, 72], [70, 71, 72]], [[1, 1, 1], [0, 1, 1]]
    whole, cut = engine.text_features(ids, masks)
    assert whole.features is not None and cut.features is not None and len(cut.features) == 2
    for form in (np.array, torch.tensor, lambda rows: [list(row) for row in np.array(rows)]):
        given: Any = form(ids), form(masks)
        for one, known in zip(engine.text_features(*given), (whole.features, cut.features), strict=True):
            assert one.features is not None
            np.testing.assert_allclose(one.features, known, atol=1e-5)


def test_gray_arrays_and_tensors_equal_gray_bytes(engine: Engine) -> None:
    gray = PIXELS[..., 0]
    forms: list[Any] = [png(gray), gray, gray[..., None], torch.from_numpy(gray.copy())[None]]
    first, *others = engine.generate([*forms], max_new_tokens=5)
    assert first.ok and told(others) == told([first] * 3)


def test_urls_are_fetched_through_the_guard_if_asked_for(
    engine: Engine, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = engine.generate("http://127.0.0.1:1/a.png")[0]
    assert result.status is Status.REFUSED and "public address" in str(result.error)
    monkeypatch.setattr("blip2_actor.inputs.image_input.FetchPolicy", of_this_machine)
    with web_server({"/a.png": [png()]}) as site:
        assert engine.generate(f"{site.url}/a.png".replace("http", "HTTP"), max_new_tokens=5) == expected
        assert engine.generate(f"{site.url}/b.png")[0].status is Status.FETCH_FAILED
    monkeypatch.setattr(engine._input_processor, "allow_urls", False)
    result = engine.generate("https://example.com/a.png")[0]
    assert result.status is Status.REFUSED and "allow_urls=True" in str(result.error)


def test_options_are_keywords(engine: Engine) -> None:
    beams = GenerationOptions(num_beams=2, max_new_tokens=9)
    changed = engine.generate(PIXELS, beams, max_new_tokens=4)
    assert changed == engine.generate(PIXELS, GenerationOptions(num_beams=2, max_new_tokens=4))
    assert engine.submit(PIXELS, beams, max_new_tokens=4).result() == changed[0]
    text = "".join(engine.stream(PIXELS, prompt="a red", max_new_tokens=4))
    assert text == engine.generate(Request(image=PIXELS, prompt="a red"), max_new_tokens=4)[0].text
    own = Request(image=PIXELS, options=beams)
    assert engine.generate(own, GenerationOptions(max_new_tokens=1)) == engine.generate(PIXELS, beams)


def test_keywords_change_the_options_of_a_request_too(engine: Engine) -> None:
    """A request's own options used to override a keyword silently."""
    beams = GenerationOptions(num_beams=2, max_new_tokens=9)
    own = Request(image=PIXELS, options=beams)
    expected = engine.generate(PIXELS, beams, max_new_tokens=4)[0]
    assert len(expected.token_ids) == 4
    greedy = engine.generate(PIXELS, max_new_tokens=4)[0]
    assert told(engine.generate([own, PIXELS], max_new_tokens=4)) == told([expected, greedy])
    assert engine.submit(own, max_new_tokens=4).result() == expected
    assert "".join(engine.stream(own, num_beams=1, max_new_tokens=4)) == greedy.text
    assert own.options is beams


def test_temperature_0_is_greedy(engine: Engine, expected: Any) -> None:
    sampled: dict[str, Any] = {"do_sample": True, "top_p": 0.9, "top_k": 3, "seed": 7}
    checkpoint = {"do_sample": True, "temperature": 0.6}
    assert GenerationOptions(temperature=0, **sampled).resolve(checkpoint) == GenerationOptions().resolve()
    assert engine.generate(PIXELS, temperature=0, max_new_tokens=5) == expected


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True}], ids=str
)
def test_each_token_has_its_log_probability(engine: Engine, options: dict[str, Any]) -> None:
    result = engine.generate(PIXELS, **options)[0]
    for completion in result.completions:
        assert len(completion.token_logprobs) == len(completion.token_ids)
        assert sum(completion.token_logprobs) == completion.logprob
        assert max(completion.token_logprobs) <= 0
    assert result.token_logprobs == result.completions[0].token_logprobs
    scored = engine.score([PIXELS], [result.text or ""])[0]
    if result.finish_reason == "stop":
        assert scored.logprob == pytest.approx(result.logprob, abs=1e-2)


def test_the_progress_bar_counts_to_the_end(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.generate([PIXELS] * 3, max_new_tokens=1)
    assert capsys.readouterr().err == ""
    engine.generate([PIXELS, None, PIXELS], max_new_tokens=1, progress=True)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda e: e.generate({}),
            "a list of them, got dict; an image is bytes, a path, a PIL image, an array or a",
        ),
        (lambda e: e.generate(None), "requests must be a Request, an image or a list of them, got NoneType"),
        (lambda e: e.generate(io.BytesIO(png())), "or a list of them, got BytesIO"),  # which has lines
        (lambda e: e.features(io.BytesIO(png())), "images must be a list, got BytesIO"),
        (
            lambda e: e.generate([PIXELS] * 2, prompt=["a", "b"]),
            "prompt must be one text for all images, got list",
        ),
        (lambda e: e.submit(PIXELS, prompt=1), "prompt must be one text for all images, got int"),
        (lambda e: e.generate(PIXELS, {"num_beams": 2}), "options must be GenerationOptions, got dict"),
        (lambda e: e.generate(PIXELS, max_token=2), "max_token is not an option; .* max_new_tokens"),
        (lambda e: e.generate(PIXELS, promt="a"), r"promt is not an option; do you mean prompt\?"),
        (lambda e: e.submit(PIXELS, max_length=2), "max_length is not an option; give max_new_tokens"),
        (lambda e: e.generate(PIXELS, do_sample="yes"), "do_sample must be true or false, got 'yes'"),
        (lambda e: e.generate(PIXELS, temperature="hot"), "temperature must be a number, got 'hot'"),
        (lambda e: e.generate(PIXELS, stop=5), "stop must be texts, got 5"),
        (lambda e: e.generate(Request(image=PIXELS), prompt="a"), "prompt must be left out with a Request"),
        (lambda e: e.features(PIXELS), "images must be a list, got ndarray of shape"),
        (lambda e: e.score(PIXELS, ["a"]), "images must be a list"),
        (lambda e: e.score([PIXELS], "a"), "texts must be a list, got str"),
        (lambda e: e.score([PIXELS], ["a"], "a"), "prompts must be a list, got str"),
        (lambda e: e.text_features("a"), "texts must be a list, got str"),
        (lambda e: e.text_features(np.array([7, 8])), "texts must be a list, got ndarray of shape"),
        (lambda e: e.generate(np.array("a.png")), "or a list of them, got ndarray"),
        (lambda e: e.features(np.array("a.png")), "images must be a list, got ndarray"),
        (
            lambda e: build(Request, image=PIXELS, options={}),
            "options must be GenerationOptions or None, got dict",
        ),
        (lambda e: build(EngineConfig, model=5), "model must be a text, got 5"),
        (lambda e: build(EngineConfig, max_slots="4"), "max_slots must be a whole number or None, got '4'"),
        (lambda e: build(EngineConfig, skip_self_test=1), "skip_self_test must be true or false, got 1"),
        (
            lambda e: build(EngineConfig, compile="false"),
            "compile must be true, false or 'auto', got 'false'",
        ),
        (lambda e: build(EngineConfig, quantize="int4"), "quantize must be 'int8', .* or None, got 'int4'"),
        (
            lambda e: build(MatchingConfig, dtype="float8"),
            "dtype must be 'auto', .* or 'float16', got 'float8'",
        ),
        (lambda e: build(GenerationOptions, early_stopping="yes"), "true, false or 'never', got 'yes'"),
        (lambda e: EngineConfig(num_threads=True), "num_threads must be a whole number or None, got True"),
        (lambda e: build(MatchingConfig, device=0), "device must be a text, got 0"),
    ],
)
def test_a_wrong_type_is_refused_by_name(engine: Engine, call: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call(engine)


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (
            PIXELS,
            None,
            "images must be a list, got ndarray",
        ),  # each row used to be read as an image, with status ok
        (png(), None, "images must be a list, got bytes"),
        ([PIXELS, PIXELS], "ab", "prompts must be a list, got str"),
    ],
    ids=["array", "bytes", "prompts"],
)
def test_an_actor_takes_lists(images: Any, prompts: Any, message: str) -> None:
    actor = Blip2Actor(FakeEngineConfig())
    batch: Any = PIXELS[None]
    assert [result.ok for result in actor.caption(batch, ["a"])] == [True]
    with pytest.raises(TypeError, match=message):
        actor.caption(images, prompts)
    with pytest.raises(ValueError, match=r"prompts must be one per image \(2\), got 1"):
        actor.caption([PIXELS, PIXELS], ["a"])
    actor.close()


def test_prompts_are_checked_as_a_list() -> None:
    """Each character of a text used to count as a prompt, so that any length passed."""
    with pytest.raises(TypeError, match="prompts must be a list, got str"):
        EngineConfig(model="demo", device="cpu").check_prompts("a" * 1000, 30)


def test_a_model_may_be_a_path(tmp_path: Path) -> None:
    path: Any = tmp_path
    assert EngineConfig(model=path) == EngineConfig(model=str(tmp_path))
    assert EngineConfig(adapter=path) == EngineConfig(adapter=str(tmp_path))


def test_numbers_of_numpy_become_numbers_of_python(engine: Engine) -> None:
    """A random generator refuses these as a seed; JSON, which stores a run's options, refuses them all."""
    three, half = np.int64(3), np.float32(0.5)
    given: Any = {"seed": three, "temperature": half, "top_k": three, "suppress_tokens": [three]}
    options = GenerationOptions(**given, do_sample=True, num_beams=2, max_new_tokens=2)
    plain = GenerationOptions(
        seed=3, temperature=0.5, top_k=3, suppress_tokens=(3,), do_sample=True, num_beams=2, max_new_tokens=2
    )
    assert json.dumps(asdict(options)) == json.dumps(asdict(plain))
    assert options.do_sample is True
    assert engine.generate(PIXELS, options)[0] == engine.generate(PIXELS, plain)[0]


def test_truth_values_of_numpy_become_those_of_python() -> None:
    """The message for one used to be: must be true or false, got np.True_."""
    yes: Any = np.True_
    no: Any = np.False_
    options = GenerationOptions(do_sample=yes, early_stopping=no)
    assert (options.do_sample, options.early_stopping) == (True, False)
    assert type(options.do_sample) is type(options.early_stopping) is bool
    assert EngineConfig(model="demo", compile=no).compile is False
    wrong: Any
    for wrong in (np.array([True]), np.int64(1)):
        with pytest.raises(TypeError, match="do_sample must be true or false, got"):
            GenerationOptions(do_sample=wrong)
    with pytest.raises(TypeError, match="max_new_tokens must be a whole number, got"):
        GenerationOptions(max_new_tokens=yes)


def test_no_representation_shows_pixels(engine: Engine) -> None:
    """Requests and images appear in logs and tracebacks."""
    shown = repr(Request(image=png(), prompt="a"))
    assert shown == "Request(prompt='a', options=None, logits_processor=None, low_priority=False)"
    assert len(repr(engine.image(PIXELS))) < 80


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_random_calls_give_a_status_or_a_named_error(engine: Engine, expected: Any, tmp_path: Path) -> None:
    """A few here; `tests/chaos/test_random_calls.py` makes thousands."""
    outcomes = call_at_random(engine, 80, seed=0, folder=tmp_path)
    assert {"ok", "undecodable", "refused", "TypeError", "ValueError"} <= set(outcomes) and CALLS
    assert engine.generate(PIXELS, max_new_tokens=5) == expected
    assert engine.stats().num_running == engine.stats().num_waiting == 0
