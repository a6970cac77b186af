"""Building a model from a checkpoint's folder, on its device and in its dtype."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from blip2_actor.checkpoints.checkpoint import Checkpoint
from blip2_actor.checkpoints.download import cache_folder
from blip2_actor.checkpoints.weights.adapter import merge_adapter
from blip2_actor.checkpoints.weights.lavis import overlay_lavis
from blip2_actor.checkpoints.weights.load_weights import load_weights
from blip2_actor.checkpoints.weights.name_map import Rule, find_target, name_map
from blip2_actor.checkpoints.weights.stored_tensor import StoredTensor
from blip2_actor.checkpoints.weights.weight_files import list_weights
from blip2_actor.models.blip2 import Blip2
from blip2_actor.models.retrieval import Blip2Retrieval
from blip2_actor.models.vision import PixelNormalizer
from blip2_actor.quantization.choice import QuantizationChoice
from blip2_actor.quantization.measurement import choose, eligible
from blip2_actor.quantization.quantize import Calibration, QuantizationRecord, quantize

phases = logging.getLogger("blip2_actor.phases")
"""Says what an engine does at its start, for hosts that show it to a person."""
HEAD, EMBEDDINGS = "language_model.lm_head.weight", "language_model.embed_tokens.weight"
"""A checkpoint that stores both (Flan-T5's does) does not share them, whatever its configuration says."""


def load_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    device_map: str | None = None,
    image_size_px: int | None = None,
) -> Blip2:
    """Load a captioning model.

    The model is built without memory. Then its parameters are allocated, and each tensor is read straight
    into its own.

    Args:
        checkpoint: of a model with a language model.
        device: of the model; if `device_map` splits the model, of its inputs.
        dtype: of the weights, except those that must keep another dtype.
        device_map: as in `EngineConfig.device_map`.
        image_size_px: size of the images, if it is not the checkpoint's own.

    Raises:
        ValueError: the tensors do not match the configuration, or `device_map` names a module or a device
            that does not exist.
        OSError: a file is missing or broken.
    """
    phases.info("loading the weights")
    model = _build(checkpoint, dtype)
    if device_map is None:
        _allocate(model, device)
        _fill(model, checkpoint, image_size_px)
    else:
        from blip2_actor.checkpoints.device_map import ModelSplit  # imports accelerate, only needed here

        split = ModelSplit(model, device_map, device, cache_folder() / "offload")
        split.materialize()
        _fill(model, checkpoint, image_size_px)
        split.attach()
    model.normalizer = _normalizer(checkpoint).to(device)
    return model


def choose_quantization(
    checkpoint: Checkpoint, method: str, device: torch.device, dtype: torch.dtype, image_size_px: int
) -> QuantizationChoice:
    """Choose which parts of a captioning model are quantized on this machine; no weights are read.

    Args:
        method: as in `EngineConfig.quantize`.
        image_size_px: size of the images.
    """
    return choose(_build(checkpoint, dtype), method, device, dtype, image_size_px)


def load_quantized(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    image_size_px: int | None,
    choice: QuantizationChoice,
    calibration: Calibration,
) -> tuple[Blip2, QuantizationRecord]:
    """Load a captioning model, and quantize the chosen parts while they are read.

    On a CPU, a plain weight that is to be quantized takes memory only until its layer is done, because the
    system gives memory to what has been written. The other arguments, and the errors, are those of
    `load_model`.

    Args:
        choice: from `choose_quantization`, perhaps of another machine.
        calibration: images and a text, for which the quantized layers are calibrated.
    """
    phases.info("loading and quantizing the weights")
    model = _build(checkpoint, dtype)
    _allocate(model, device)
    readers = _fill(model, checkpoint, image_size_px, later=tuple(eligible(model, choice.parts)))
    model.normalizer = _normalizer(checkpoint).to(device)
    return model, quantize(model, readers, choice, calibration)


def _build(checkpoint: Checkpoint, dtype: torch.dtype) -> Blip2:
    """Return a captioning model on the meta device, without memory."""
    with torch.device("meta"):
        model = Blip2(checkpoint.config)
    return model.cast(dtype)


def _allocate(model: torch.nn.Module, device: torch.device) -> None:
    """Give memory to a model on the meta device, as `Module.to_empty` does.

    That method calls `empty_like`, which on the meta device is Python that imports sympy. The import takes
    longer than everything else that builds an engine for the demonstration checkpoint (torch 2.13).
    """
    model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))


def _fill(
    model: Blip2, checkpoint: Checkpoint, image_size_px: int | None, later: Sequence[str] = ()
) -> dict[str, Callable[[], None]]:
    """Read the weights into a model whose memory is allocated.

    Args:
        later: names of layers whose weights are not read yet.

    Returns:
        For each layer in `later`, a function that reads its weight.
    """
    config, language_model = checkpoint.config, model.language_model
    model.eval().requires_grad_(False)
    rules = rules_of(checkpoint)
    tensors = stored_tensors(checkpoint)
    targets = {target.name for name in tensors if (target := find_target(name, rules)) is not None}
    has_own_head = {HEAD, EMBEDDINGS} <= targets
    if config.text_config.tie_word_embeddings and not has_own_head:
        language_model.tie_weights()
    weights = [f"{name}.weight" for name in later]
    readers = load_weights(model, tensors, rules, str(checkpoint.folder), weights)
    if has_own_head and torch.equal(language_model.lm_head.weight, language_model.embed_tokens.weight):
        language_model.tie_weights()
    if image_size_px is not None:
        model.vision.resize(image_size_px)
        config.vision_config.image_size = image_size_px  # which sizes batches and memory
    return dict(zip(later, (readers[weight] for weight in weights), strict=True))


def load_retrieval(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Blip2Retrieval:
    """Load a model for image-text retrieval; the arguments and the errors are those of `load_model`."""
    config = checkpoint.retrieval_config
    with torch.device("meta"):
        model = Blip2Retrieval(config)
    model = model.cast(dtype).eval().requires_grad_(False)
    _allocate(model, device)
    load_weights(model, stored_tensors(checkpoint), rules_of(checkpoint), str(checkpoint.folder))
    model.normalizer = _normalizer(checkpoint).to(device)
    return model


def rules_of(checkpoint: Checkpoint) -> list[Rule]:
    """Return the name map of a model."""
    config = checkpoint.retrieval_config if checkpoint.is_retrieval else checkpoint.config
    reader = "bert" if checkpoint.is_retrieval else config.text_config.model_type
    return name_map(reader, config.qformer_config.cross_attention_frequency)


def stored_tensors(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """Return the weights by their names in transformers' model, with the adapter merged."""
    tensors, adapter = list_weights(checkpoint.folder), checkpoint.adapter
    if adapter is None:
        return tensors
    return (overlay_lavis if adapter.is_lavis else merge_adapter)(tensors, adapter.folder)


def _normalizer(checkpoint: Checkpoint) -> PixelNormalizer:
    processor = checkpoint.image_processor
    return PixelNormalizer(processor.mean, processor.std, processor.rescale_factor)
