"""A quantized engine can do everything that an engine can, and reports which layers it has quantized."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from blip2_actor import Engine, EngineConfig, GenerationOptions, QuantizationChoice, Request
from blip2_actor.engine import self_test
from blip2_actor.engine.self_test import SelfTestFailure
from blip2_actor.models.layers import Linear
from blip2_actor.quantization.choice import PARTS
from blip2_actor.quantization.int8 import FULL_WEIGHT, largest_weight
from blip2_actor.testing import random_images
from tests.engines import cpu_config

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="int8 needs oneDNN")
IMAGES = list(random_images(4).numpy())
BITS = 8 if largest_weight() == FULL_WEIGHT else 7
EVERYTHING = QuantizationChoice(method="int8", parts=PARTS, weight_bits=BITS, instructions="here")


def test_a_small_model_is_left_alone(caplog) -> None:
    """In int8 the demonstration checkpoint is slower, and would lose exactness for nothing."""
    config = cpu_config("demo", quantize="int8", skip_self_test=True)
    with caplog.at_level(logging.WARNING), config.build() as engine:
        assert engine.quantization is not None
        assert set(engine.quantization.num_layers.values()) == {0}
        assert engine.quantization.logits_error == 0
    assert "quantize=int8 changes nothing" in caplog.text


@pytest.fixture(
    scope="module",
    params=[("opt", "int8"), ("t5", "int8"), ("opt", "int8-weights"), ("t5", "int8-weights")],
    ids=" ".join,
)
def engines(request, checkpoint_folder: Callable[..., Path]) -> Iterator[tuple[Engine, Engine]]:
    """An engine and a quantized one with every eligible layer in int8, even layers too small to gain."""
    model, method = request.param
    folder = str(checkpoint_folder(model))
    choice = EVERYTHING if method == "int8" else None
    config = cpu_config(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_test, "MAX_QUANTIZATION_ERROR", 1.0)  # random weights of width 16 deviate widely
        other = replace(config, quantize=method, quantization_choice=choice)
        with config.build() as plain, other.build() as quantized:
            yield plain, quantized


def test_every_chosen_layer_is_quantized_and_its_plain_weight_is_gone(engines) -> None:
    plain, quantized = engines
    record = quantized.quantization
    assert plain.quantization is None
    chosen = ["language_model"] if record.choice.method == "int8-weights" else PARTS
    assert sum(record.num_layers.values()) > 0.9 * sum(record.num_eligible[part] for part in chosen)
    assert json.loads(json.dumps(asdict(record)))["num_eligible"] == record.num_eligible, "for results"
    layers = {n: m for n, m in quantized.model.named_modules() if isinstance(m, Linear)}
    left = {name for name, layer in layers.items() if layer.quantized is None}
    never = {"vision.patch_embedding", "language_model.lm_head", *record.too_different}
    assert left == never | {name for name in layers if name.partition(".")[0] not in chosen}
    assert not any(layer.weight.numel() for layer in layers.values() if layer.quantized is not None)


@pytest.mark.parametrize(
    "options",
    [
        GenerationOptions(),
        GenerationOptions(num_beams=3),
        GenerationOptions(do_sample=True, seed=1),
        GenerationOptions(num_beams=2, num_return_sequences=2),
    ],
)
def test_texts_do_not_depend_on_the_texts_next_to_them(engines, options: GenerationOptions) -> None:
    _, quantized = engines
    options = replace(options, max_new_tokens=6)
    together = quantized.generate([Request(image=image) for image in IMAGES], options)
    alone = [quantized.generate(Request(image=image), options)[0] for image in IMAGES]
    assert all(result.ok for result in together)
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


def test_scores_and_features_are_near_those_of_the_plain_engine(engines) -> None:
    plain, quantized = engines
    scores = [[s.logprob for s in e.score(IMAGES, ["a dog"] * 4)] for e in engines]
    assert scores[0] != scores[1]
    assert scores[1] == pytest.approx(scores[0], rel=0.1)
    for before, after in zip(plain.features(IMAGES), quantized.features(IMAGES), strict=True):
        difference = abs(before.qformer_features - after.qformer_features).mean()
        is_changed = "qformer" in quantized.quantization.choice.parts
        assert difference < 0.2 * abs(before.qformer_features).mean() and is_changed is bool(difference > 0)


def test_a_difference_beyond_the_bound_is_refused(engines, monkeypatch, caplog) -> None:
    _, quantized = engines
    monkeypatch.setattr(self_test, "MAX_QUANTIZATION_ERROR", 1e-6)
    with pytest.raises(SelfTestFailure, match=r"must differ by at most 1e-06 .* leave out --quantize$"):
        quantized.config.build()
    with replace(quantized.config, skip_self_test=True).build():
        assert "must differ by at most 1e-06" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int4"}, "quantize must be 'int8', 'fp8', 'int8-weights' or None, got 'int4'"),
        ({"device_map": json.dumps({"vision": 0})}, "device_map must be left out with quantize"),
    ],
)
def test_what_does_not_work_together_is_refused_by_name(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**{"model": "demo", "quantize": "int8", **options})


def test_what_does_not_work_on_a_cpu_is_refused_by_name() -> None:
    """fp8 is refused even when a run is prepared, before a worker starts."""
    config = EngineConfig(model="demo", device="cpu", quantize="int8", compile=True)
    with pytest.raises(ValueError, match=r"^compile must not be true with quantize on a CPU"):
        config.build()
    with pytest.raises(ValueError, match=r"^quantize must be int8 or int8-weights on a CPU, got fp8"):
        replace(config, quantize="fp8").info()
