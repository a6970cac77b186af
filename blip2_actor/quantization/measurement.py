"""Choosing which parts of a model are quantized: those that are faster, by a measurement on this machine.

A small layer is slower in int8, because quantizing its input takes longer than its product saves. So each
shape is timed in both ways when a model is loaded. The layers of one part are taken together: a part is then
clearly faster or clearly slower, and two starts on one kind of machine decide alike.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from blip2_actor.models.blip2 import Blip2
from blip2_actor.models.layers import Linear, packed_dtypes
from blip2_actor.quantization.choice import PARTS, QuantizationChoice
from blip2_actor.quantization.int8 import Int8Weight, largest_weight
from blip2_actor.quantization.methods import fixed_parts, instructions, weight_bits

logger = logging.getLogger(__name__)

NEVER = ("vision.patch_embedding", "language_model.lm_head")
"""Layers that are not quantized: pixels enter the one, and tokens are chosen by the other."""
UNUSED = ".text_mlp."
"""Part of the names of layers that a captioning model may have but never runs, so they stay uncalibrated."""
NUM_IMAGES, NUM_TEXTS = 8, 64
"""Images in the Q-Former and texts in a decode step for which shapes are timed: those of a busy engine. A
layer of the vision encoder has enough rows for one image."""
MAX_TIME = 0.8
"""A part is quantized if it takes at most this fraction of its time; a smaller gain might be noise."""
NUM_RUNS = 5


@dataclass(frozen=True)
class Shape:
    """What the time of a layer depends on."""

    in_features: int
    out_features: int
    has_activation: bool
    num_rows: int


def part_of(name: str) -> str:
    """Return the part of the model that a layer is in."""
    return name.partition(".")[0]


def eligible(model: Blip2, parts: Collection[str] = PARTS) -> dict[str, Linear]:
    """Return the layers of some parts that can be quantized, by name, in the order of `PARTS`."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Linear) and part_of(name) in parts and name not in NEVER and UNUSED not in name
    }


def choose(
    model: Blip2, method: str, device: torch.device, dtype: torch.dtype, image_size_px: int
) -> QuantizationChoice:
    """Choose the parts that are quantized.

    Args:
        model: its weights need not be loaded.
        method: as in `EngineConfig.quantize`.
        device: where the model is to run.
        dtype: in which the layers compute otherwise.
        image_size_px: side of the images, which decides how many rows a layer of the vision encoder has.
    """
    fixed = fixed_parts(method, device, model.config.text_config.model_type)
    fractions = _measure(model, dtype, image_size_px) if fixed is None else {}
    return QuantizationChoice(
        method=method,
        parts=tuple(fractions) if fixed is None else fixed,
        weight_bits=weight_bits(method, device),
        instructions=instructions(device),
        time_fractions=tuple(fractions.values()),
    )


def _measure(model: Blip2, dtype: torch.dtype, image_size_px: int) -> dict[str, float]:
    """Return the time in int8 over the time in `dtype`, of each part that is faster in int8."""
    layers = eligible(model)
    times: dict[Shape, tuple[float, float]] = {}
    chosen = {}
    for part, names in groupby(layers, key=part_of):
        shapes = [_shape(model, image_size_px, name, layers[name]) for name in names]
        for shape in set(shapes).difference(times):
            times[shape] = _time_both_ways(shape, dtype)
        plain, quantized = (sum(times[shape][way] for shape in shapes) for way in (0, 1))
        logger.info("%s in int8 takes %.2f of its time in %s", part, quantized / plain, dtype)
        if quantized <= MAX_TIME * plain:
            chosen[part] = round(quantized / plain, 2)
    return chosen


def _shape(model: Blip2, image_size_px: int, name: str, linear: Linear) -> Shape:
    num_image_tokens = (image_size_px // model.config.vision_config.patch_size) ** 2 + 1
    if name.startswith("vision") or name == "qformer.cross_kv":
        num_rows = num_image_tokens
    elif name.startswith("language_model"):
        num_rows = NUM_TEXTS
    else:
        num_rows = NUM_IMAGES * model.config.num_query_tokens
    return Shape(linear.in_features, linear.out_features, linear.activation is not None, num_rows)


@torch.inference_mode()
def _time_both_ways(shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
    """Return the seconds of a layer of this shape in `dtype` and in int8."""
    activation = "gelu" if shape.has_activation else None
    plain, quantized = (
        Linear(shape.in_features, shape.out_features, activation=activation).requires_grad_(False)
        for _ in range(2)
    )
    for parameter in (*plain.parameters(), *quantized.parameters()):
        parameter.fill_(0.01)  # the time does not depend on the values
    quantized.take(Int8Weight(quantized.weight, largest_weight()))
    plain = plain.to(dtype)
    if dtype in packed_dtypes():  # as in the model, but without its warning for each shape
        plain.pack()
    input = torch.ones(shape.num_rows, shape.in_features, dtype=dtype)
    return _time(plain, input), _time(quantized.to(dtype), input)


def _time(layer: Callable[[Tensor], Tensor], input: Tensor) -> float:
    """Return the shortest of several runs, in seconds of this thread; the first run prepares the kernel."""
    times = []
    for _ in range(NUM_RUNS + 1):
        started = time.thread_time()
        layer(input)
        times.append(time.thread_time() - started)
    return min(times[1:])
