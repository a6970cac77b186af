"""What happens before the first request: load the weights, size the engine for its device, test it.

It runs in the engine's thread, like everything that computes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from blip2_actor.checkpoints.checkpoint import Checkpoint, resolve
from blip2_actor.checkpoints.download import cache_folder
from blip2_actor.checkpoints.loading import choose_quantization, load_model, load_quantized, phases
from blip2_actor.checkpoints.tokenizer import PromptTokenizer
from blip2_actor.device import prepare_device, resolve_compile, resolve_device, resolve_dtype
from blip2_actor.engine import self_test
from blip2_actor.engine.cuda_graphs import capturer_for
from blip2_actor.engine.encoders import Encoders
from blip2_actor.engine.input_processor import InputProcessor
from blip2_actor.engine.memory import size_engine
from blip2_actor.engine.model_runner import ModelRunner
from blip2_actor.models.layers import pack_for_cpu
from blip2_actor.quantization.choice import QuantizationChoice
from blip2_actor.quantization.methods import FP8, fuses, require_method
from blip2_actor.quantization.quantize import Calibration, QuantizationRecord

logger = logging.getLogger(__name__)

RECORDS = "canary"
"""Folder of the cache with the records of self-tests. It keeps its first name, so that an upgrade finds the
records before it."""


@dataclass(frozen=True, kw_only=True)
class StartedModel:
    """A model on its device, ready for requests."""

    runner: ModelRunner
    input_processor: InputProcessor
    encode_batch: int
    encodes_ahead: bool
    """True if images are encoded next to decode steps: by a second thread on a CPU with several cores, on a
    second stream on a GPU."""
    self_test: self_test.SelfTestRecord | None
    """None if the self-test was skipped."""
    quantization: QuantizationRecord | None
    """None if the model is not quantized."""


def start_model(
    *,
    model: str,
    revision: str | None,
    adapter: str | None,
    device: str,
    dtype: str,
    num_threads: int,
    require_wanted: Callable[[], None],
    max_slots: int | None,
    encode_batch: int | None,
    compile: bool | Literal["auto"],
    device_map: str | None,
    skip_self_test: bool,
    skip_cuda_graphs: bool,
    allow_urls: bool,
    ignore_generation_config: bool,
    image_size_px: int | None,
    quantize: str | None,
    quantization_choice: QuantizationChoice | None,
) -> StartedModel:
    """Load a checkpoint; the other arguments are those of `EngineConfig`, `num_threads` resolved.

    Args:
        require_wanted: called between the phases; raises if the model is no longer needed.

    Raises:
        ValueError: the configuration or the checkpoint cannot be run; the message names the field.
        OSError: the checkpoint cannot be found or read.
    """
    place = resolve_device(device)
    prepare_device(place)
    checkpoint = resolve(model, revision, adapter=adapter)
    require_wanted()
    prompts = PromptTokenizer(checkpoint.folder, checkpoint.config)  # first: the config refuses other models
    size_px = checkpoint.image_processor.image_size(checkpoint.config.vision_config, image_size_px)
    generation_config = _generation_config(checkpoint, ignore_generation_config)
    resolved, quantization = resolve_dtype(dtype, place), None
    if quantize is None:
        loaded = load_model(checkpoint, place, resolved, device_map, image_size_px)
    else:
        _require_quantization(quantize, place, compile)
        choice = quantization_choice or choose_quantization(checkpoint, quantize, place, resolved, size_px)
        calibration = Calibration(self_test.built_in_images(size_px), prompts.empty_ids)
        loaded, quantization = load_quantized(checkpoint, place, resolved, image_size_px, choice, calibration)
        self_test.check_quantization(quantization, is_refused=not skip_self_test)
    require_wanted()
    is_compiled = resolve_compile(compile, device_map, place, fuses=fuses(quantize, resolved))
    is_plain_cpu = place.type == "cpu" and device_map is None and not is_compiled
    if is_plain_cpu:
        pack_for_cpu(loaded)
    has_two_threads = is_plain_cpu and num_threads > 1
    replays = place.type == "cuda" and device_map is None and not skip_cuda_graphs
    replays_images = replays and not is_compiled  # by a captured pass, which keeps its memory
    sizes = size_engine(loaded, max_slots, encode_batch, 2 if has_two_threads or replays_images else 1)
    # Before the runner: the lengths that it admits depend on the memory that is free without any slots.
    input_processor = InputProcessor(loaded, prompts, size_px, sizes.max_slots, generation_config, allow_urls)
    encoders = Encoders(loaded, sizes.encode_batch, is_compiled, capturer_for(place, replays_images, 0))
    runner = ModelRunner(loaded, sizes.max_slots, encoders, capturer_for(place, replays))
    require_wanted()
    test = None if skip_self_test else _test(runner, input_processor, checkpoint, image_size_px, quantization)
    return StartedModel(
        runner=runner,
        input_processor=input_processor,
        encode_batch=sizes.encode_batch,
        encodes_ahead=has_two_threads or (place.type == "cuda" and device_map is None),
        self_test=test,
        quantization=quantization,
    )


def _generation_config(checkpoint: Checkpoint, is_ignored: bool) -> dict[str, Any]:
    found = checkpoint.generation_config(is_ignored)
    if found:
        logger.info("Options of the checkpoint's generation_config.json: %s", found)
    return found


def _require_quantization(quantize: str, place: torch.device, compile: bool | Literal["auto"]) -> None:
    require_method(quantize, place)
    if compile is True and place.type == "cpu":
        raise ValueError("compile must not be true with quantize on a CPU, got both; drop one of them")


def _variant(image_size_px: int | None, quantization: QuantizationRecord | None, max_slots: int) -> str:
    """Name what gives a self-test other captions: images of another size, quantized parts, fewer images."""
    variant = "" if image_size_px is None else f" {image_size_px} px"
    if quantization is not None:
        variant += f" {quantization.choice}"
    return variant if max_slots >= self_test.NUM_IMAGES else f"{variant} {max_slots} images"


def _test(
    runner: ModelRunner,
    input_processor: InputProcessor,
    checkpoint: Checkpoint,
    image_size_px: int | None,
    quantization: QuantizationRecord | None,
) -> self_test.SelfTestRecord:
    is_compiled = runner.encoders.compiled_batch is not None
    phases.info("compiling and testing the model" if is_compiled else "testing the model")
    is_fp8 = quantization is not None and quantization.choice.method == FP8
    record = self_test.check(
        runner, input_processor.prompts.empty_ids, input_processor.image_size_px, is_fp8=is_fp8
    )
    variant = _variant(image_size_px, quantization, runner.num_slots)
    folder = cache_folder() / RECORDS
    self_test.compare_with_last(record, folder, checkpoint.digest() + variant, runner.dtype)
    return record
