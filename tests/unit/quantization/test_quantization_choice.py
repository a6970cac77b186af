"""Which parts are quantized: chosen by the model's actual shapes, and alike on all machines of a job."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from blip2_actor import EngineConfig, QuantizationChoice
from blip2_actor.models.blip2 import Blip2
from blip2_actor.quantization import int8, measurement
from blip2_actor.quantization.measurement import Shape
from blip2_actor.quantization.methods import storage
from blip2_actor.testing.tiny_checkpoints import tiny_config

DEMO = EngineConfig(model="demo", device="cpu", dtype="float32", num_threads=1, quantize="int8")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """Return the shapes timed from now on; each takes half of its time when quantized."""
    shapes: list[Shape] = []

    def time(shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
        shapes.append(shape)
        return 1.0, 0.5

    monkeypatch.setattr(measurement, "_time_both_ways", time)
    return shapes


@pytest.mark.parametrize(
    ("image_size_px", "num_rows"), [(None, (64 // 8) ** 2 + 1), (128, (128 // 8) ** 2 + 1)]
)
def test_shapes_are_timed_at_the_size_of_the_images(
    timed: list[Shape], image_size_px: int | None, num_rows: int
) -> None:
    """With --image-size-px, the checkpoint's own size used to be timed, at which other parts may gain."""
    choice = dataclasses.replace(DEMO, image_size_px=image_size_px).choose_quantization()
    assert choice is not None and choice.parts == (
        "vision",
        "qformer",
        "language_projection",
        "language_model",
    )
    assert num_rows in {shape.num_rows for shape in timed}
    assert {shape.num_rows for shape in timed} <= {num_rows, 64, 8 * DEMO.info().num_queries}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="int8 needs oneDNN")
def test_a_cpu_without_bfloat16_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each timed shape used to repeat the warning, ten times for the demonstration checkpoint."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    choice = dataclasses.replace(DEMO, dtype="bfloat16").choose_quantization()
    assert choice is not None and "slow in it" not in caplog.text  # the engine warns about its own layers


def test_a_choice_is_stored_as_json_and_is_not_made_again(timed: list[Shape]) -> None:
    choice = DEMO.choose_quantization()
    assert choice is not None
    assert QuantizationChoice.from_dict(json.loads(json.dumps(choice.to_dict()))) == choice
    assert dataclasses.replace(DEMO, quantization_choice=choice).choose_quantization() is choice
    assert dataclasses.replace(DEMO, quantize=None).choose_quantization() is None
    for method in (None, "int8-weights"):
        with pytest.raises(
            ValueError, match=r"^quantization_choice must be one for quantize=.* got one for 'int8'"
        ):
            dataclasses.replace(DEMO, quantize=method, quantization_choice=choice)


def test_weights_alone_are_quantized_in_the_language_model_whatever_the_speed(timed: list[Shape]) -> None:
    choice = dataclasses.replace(DEMO, quantize="int8-weights").choose_quantization()
    assert choice is not None and choice.parts == ("language_model",)
    assert not timed


def test_eight_bits_of_another_cpu_are_refused_where_their_products_saturate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rows of such a machine would have another precision, or be wrong."""
    choice = QuantizationChoice(method="int8", parts=(), weight_bits=8, instructions="AVX512 VNNI")
    monkeypatch.setattr(int8, "largest_weight", lambda: int8.HALF_WEIGHT)
    with pytest.raises(ValueError, match=r"^quantize must use weights of 7 bits .* 8 bits \(AVX512 VNNI\)"):
        storage(choice, torch.device("cpu"))
    seven = dataclasses.replace(choice, weight_bits=7)
    monkeypatch.setattr(int8, "largest_weight", lambda: int8.FULL_WEIGHT)
    weight = storage(seven, torch.device("cpu"))(torch.eye(16))
    torch.testing.assert_close(weight.scale * 127, torch.full((16,), 1 / 63))  # type: ignore[attr-defined]


def test_layers_for_text_in_the_qformer_are_not_quantized() -> None:
    """No caption runs them, so they used to wait for their weight forever, and counted as quantized."""
    config = tiny_config()
    config.qformer_config.use_qformer_text_input = True
    with torch.device("meta"):
        layers = measurement.eligible(Blip2(config), ("qformer",))
    assert "qformer.layers.0.query_mlp.fc1" in layers
    assert not [name for name in layers if "text" in name]
