"""Quantized models give nearly the results of the plain models, on random weights and with outliers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig, OPTConfig, T5Config

from blip2_actor.models.blip2 import Blip2
from blip2_actor.models.opt import OptLayer
from blip2_actor.models.vision import PixelNormalizer
from blip2_actor.quantization import quantize as quantizing
from blip2_actor.quantization.choice import PARTS, QuantizationChoice
from blip2_actor.quantization.int8 import FULL_WEIGHT, largest_weight
from blip2_actor.quantization.measurement import eligible
from blip2_actor.quantization.methods import fixed_parts
from blip2_actor.quantization.quantize import Calibration, QuantizationRecord, quantize
from blip2_actor.quantization.smoothing import divide, preceding_norms
from blip2_actor.testing.random_weights import randomize_weights

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="int8 needs oneDNN")
SIZE_PX, VOCAB_SIZE = 28, 300
METHODS = ("int8", "fp8", "int8-weights")
MARGIN = {"int8": 0.2, "fp8": 0.4, "int8-weights": 0.2}
"""To be compared, a reference's largest logit must lead by this many standard deviations; rounding
decides closer ones."""
MAX_ERROR = {"int8": 0.15, "fp8": 0.25, "int8-weights": 0.15}


def random_model(width: int, language: str = "opt", seed: int = 0) -> Blip2:
    common = {"num_hidden_layers": 3, "num_attention_heads": 4}
    vision = Blip2VisionConfig(
        hidden_size=width, intermediate_size=4 * width, image_size=SIZE_PX, patch_size=7, **common
    )
    qformer = Blip2QFormerConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=width // 2,
        intermediate_size=2 * width,
        encoder_hidden_size=width,
        **common,
    )
    ids = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    if language == "opt":
        text = OPTConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=width,
            ffn_dim=4 * width,
            word_embed_proj_dim=width,
            max_position_embeddings=64,
            **common,
            **ids,
        )
    else:
        text = T5Config(
            vocab_size=VOCAB_SIZE,
            d_model=width,
            d_kv=width // 4,
            d_ff=4 * width,
            num_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=1,
            **ids,
        )
    config = Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=8)
    model = Blip2(config)
    model.normalizer = PixelNormalizer((0.5,) * 3, (0.25,) * 3, 1 / 255)
    randomize_weights(model, seed=seed, std=width**-0.5, vector_std=0.1)
    for name, parameter in model.named_parameters():
        if language == "t5" and name.endswith(("qkv.weight", "cross_query.weight")) and "language" in name:
            parameter.data[:width] *= (width // 4) ** -0.5  # T5 does not scale its scores
    return model.eval().requires_grad_(False)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)


CALIBRATION = Calibration(images(3), [2])


def parts_of(model: Blip2, method: str) -> tuple[str, ...]:
    """Return the parts to quantize: all; for fp8, which has four significant bits, those of a GPU."""
    fixed = fixed_parts(method, torch.device("cuda"), model.config.text_config.model_type)
    return fixed if method == "fp8" and fixed else PARTS


def quantize_all(model: Blip2, method: str = "int8") -> QuantizationRecord:
    """Quantize every eligible layer; the weights are in the model already, so there is nothing to read."""
    bits = 7 if method == "int8" and largest_weight() < FULL_WEIGHT else 8
    parts = parts_of(model, method)
    choice = QuantizationChoice(method=method, parts=parts, weight_bits=bits, instructions="here")
    readers = {name: lambda: None for name in eligible(model, choice.parts)}
    return quantize(model, readers, choice, CALIBRATION)


@torch.inference_mode()
def first_logits(model: Blip2) -> torch.Tensor:
    """Return the logits of the first token of many images, float32[B, V]."""
    pixel_values = model.normalizer(torch.from_numpy(images(256)), torch.float32)
    prefixes = model.project(model.qformer_features(model.image_features(pixel_values)))
    return torch.cat(model.language_model.predict(list(prefixes), [torch.tensor([2, 5])] * len(prefixes)))[
        ::2
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("width", "language"), [(32, "opt"), (48, "t5"), (64, "opt"), (96, "t5"), (128, "opt")]
)
def test_random_models_choose_the_same_first_token(width: int, language: str, method: str) -> None:
    model = random_model(width, language, seed=width)
    before = first_logits(model)
    record = quantize_all(model, method)
    assert record.too_different == ()
    assert {part for part, count in record.num_layers.items() if count} == set(parts_of(model, method))
    after = first_logits(model)
    largest = before.topk(2).values
    counts = (largest[:, 0] - largest[:, 1]) / before.std() > MARGIN[method]
    assert counts.sum() >= 34  # otherwise a single row could decide
    agreement = (before.argmax(-1) == after.argmax(-1))[counts].float().mean()
    assert agreement >= 0.97
    assert record.logits_error < MAX_ERROR[method]


def with_outliers(model: Blip2) -> Blip2:
    """Make some channels of the activations 100 times the others, as in OPT, without changing any result."""
    for linear, norm in preceding_norms(model).items():
        factors = torch.ones(linear.in_features)
        factors[3::23] = 100
        divide(norm, 1 / factors)
        linear.weight /= factors
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("language", ["opt", "t5"])
def test_outlier_channels_cost_nothing(language: str, method: str) -> None:
    plain = random_model(64, language)
    model = with_outliers(random_model(64, language))
    torch.testing.assert_close(first_logits(model), first_logits(plain), rtol=0, atol=1e-3)
    expected, record = quantize_all(plain, method), quantize_all(model, method)
    assert record.too_different == ()
    assert record.logits_error < 1.5 * expected.logits_error


def test_a_layer_that_would_differ_too_much_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without smoothing, outliers use up the bits of the other channels; such a layer is reported once."""
    model = with_outliers(random_model(64))
    monkeypatch.setattr(quantizing, "preceding_norms", lambda model: {})
    record = quantize_all(model)
    assert "vision.layers.0.qkv" in record.too_different
    assert record.num_layers["vision"] == record.num_eligible["vision"] - sum(
        name.startswith("vision") for name in record.too_different
    )
    assert caplog.text.count("vision.layers.0.qkv") == 1
    assert record.logits_error < 0.15


def test_the_calibration_sees_the_model_as_it_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits that the quantized model is compared with are the plain model's, bit for bit."""
    model = random_model(32)
    expected = CALIBRATION.logits(model)
    seen: list[torch.Tensor] = []
    logits = Calibration.logits

    def seeing(calibration: Calibration, model: Blip2) -> torch.Tensor:
        seen.append(logits(calibration, model))
        return seen[-1]

    monkeypatch.setattr(Calibration, "logits", seeing)
    quantize_all(model)
    assert len(seen) == 2
    assert torch.equal(seen[0], expected)
    assert not torch.equal(seen[1], expected)


@pytest.mark.parametrize("language", ["opt", "t5"])
def test_activations_move_into_the_layers_that_read_them(
    language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, apart = (random_model(64, language) for _ in range(2))
    quantize_all(fused, "fp8")
    with monkeypatch.context() as patch:
        patch.setattr(quantizing, "fuse_activations", lambda model: None)
        quantize_all(apart, "fp8")
    assert all(block.fc1.activation is None for block in fused.vision.layers)
    assert all(block.fc1.activation is not None for block in apart.vision.layers)
    opt_layers = [module for module in fused.modules() if isinstance(module, OptLayer)]
    assert all(layer.fc1.activation is None for layer in opt_layers) and len(opt_layers) in (0, 3)
    torch.testing.assert_close(first_logits(fused), first_logits(apart))
