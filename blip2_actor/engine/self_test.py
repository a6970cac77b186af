"""The self-test: at start, caption built-in images alone and in a batch, and compare.

It finds a kernel, a library or a device that lets the rows of a batch disturb each other, and a replayed step
that does something else than the eager step. The result is also stored per checkpoint, dtype and device, so
that an upgrade that changes captions is reported.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor

from blip2_actor.checkpoints.download import write_cached
from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.model_runner import ModelRunner
from blip2_actor.engine.out_of_memory import OutOfMemory, catch_out_of_memory, is_out_of_memory
from blip2_actor.engine.request_state import NOT_FINITE, RequestState
from blip2_actor.quantization.quantize import QuantizationRecord

logger = logging.getLogger(__name__)

NUM_IMAGES = 3
NUM_TOKENS = 4
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Maximum difference of logits that should be equal, divided by their standard deviation. It is far above
rounding (float32: 2e-6 on a random model of 12 layers, AVX512 CPU, 2026-11-23) and far below a leak."""
FP8_TOLERANCE = 1.0
"""The same with quantize=fp8. In a batch, a number may be rounded otherwise than for a single image, and its
neighbour in fp8 is 6 % away: 0.4 standard deviations on a random model of 12 layers in each part (H100,
2026-11-27)."""
MAX_QUANTIZATION_ERROR = 0.25
"""Maximum root mean square difference that quantization may make to the logits of built-in images, divided by
their standard deviation."""


@dataclass(frozen=True)
class SelfTestRecord:
    """The result of a self-test, and the software and device that gave it."""

    digest: str
    """Digest of the captions' token ids."""
    torch: str
    transformers: str
    device: str


class SelfTestFailure(RuntimeError):
    """The same image gave different results, alone and in a batch or replayed and eager.

    No caption of this engine can be trusted.
    """


def check_quantization(record: QuantizationRecord, is_refused: bool) -> None:
    """Say what quantization has changed, and compare it with the bound.

    Args:
        is_refused: whether to raise, and not only to warn, if the difference is too large.

    Raises:
        SelfTestFailure: the logits differ by more than `MAX_QUANTIZATION_ERROR`.
    """
    logger.info("Quantized to %s", record.summary())
    if not any(record.num_layers.values()):
        logger.warning(
            "quantize=%s changes nothing: no part of this model is faster in it", record.choice.method
        )
    if record.logits_error <= MAX_QUANTIZATION_ERROR:
        return
    message = (
        f"logits of the quantized model must differ by at most {MAX_QUANTIZATION_ERROR} standard deviations "
        f"from those of the model itself, got {record.logits_error:.3g}; leave out --quantize"
    )
    if is_refused:
        raise SelfTestFailure(message)
    logger.warning(message)


class Captioned(NamedTuple):
    """Captions of n images, which `_caption` leaves in slots 0..n-1."""

    first_logits: Tensor
    """float32[n, V], logits of the first tokens."""
    token_ids: list[list[int]]
    length: int
    """Cached positions before the first token."""


def check(
    runner: ModelRunner, start_ids: Sequence[int], size_px: int, is_fp8: bool = False
) -> SelfTestRecord:
    """Caption the built-in images alone and together. This also compiles encoders that are to be compiled.

    With fewer slots than `NUM_IMAGES`, there are as many images as slots.

    Raises:
        SelfTestFailure: results differ by more than the dtype explains.
        ValueError: memory does not suffice even for these images.
    """
    pictures = built_in_images(size_px)[: runner.num_slots]
    full_batch = runner.encoders.compiled_batch or 0
    tolerance = FP8_TOLERANCE if is_fp8 else TOLERANCE[runner.dtype]
    try:
        together = _caption(runner, pictures, start_ids, full_batch)
        if runner.replays_steps:
            _require_near(
                tolerance,
                *_step_both_ways(runner, together),
                "of a step, eager and replayed",
                "--skip-cuda-graphs",
            )
        each = [_caption(runner, pictures[i : i + 1], start_ids).first_logits for i in range(len(pictures))]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"max_slots and encode_batch must fit into memory, got {runner.num_slots} texts at once and "
            f"{error}; lower --max-slots or --encode-batch"
        ) from error
    alone = torch.cat(each)
    _require_near(
        tolerance, together.first_logits, alone, "of an image, alone and in a batch", "--dtype float32"
    )
    return SelfTestRecord(
        digest=hashlib.sha256(json.dumps(together.token_ids).encode()).hexdigest()[:16],
        torch=torch.__version__,
        transformers=transformers.__version__,
        device=_device_name(runner.device),
    )


def compare_with_last(
    record: SelfTestRecord, folder: Path, checkpoint_digest: str, dtype: torch.dtype
) -> str | None:
    """Store a record, and compare it with that of the last start.

    Args:
        folder: holds one record per checkpoint, dtype and device.

    Returns:
        What has changed if the captions have; None if they are the same, or if this is the first start.
    """
    key = hashlib.sha256(f"{checkpoint_digest} {dtype} {record.device}".encode()).hexdigest()[:24]
    path = folder / f"{key}.json"
    last = _read_record(path)
    write_cached(path, json.dumps(asdict(record)))
    if last is None or last.digest == record.digest:
        return None
    changes = [
        f"{name} {before} -> {now}"
        for name in ("torch", "transformers")
        if (before := getattr(last, name)) != (now := getattr(record, name))
    ]
    message = (
        f"captions of the built-in images have changed since the last start ({last.digest} -> "
        f"{record.digest}); changed since: {', '.join(changes) or 'neither torch nor transformers'}"
    )
    logger.warning(message)
    return message


def _read_record(path: Path) -> SelfTestRecord | None:
    """Return None if there is no readable record: only the comparison is lost."""
    try:
        return SelfTestRecord(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _caption(
    runner: ModelRunner, pictures: np.ndarray, start_ids: Sequence[int], min_encoded: int = 0
) -> Captioned:
    """Generate a few tokens of each image by greedy search, in slots 0..n-1."""
    images = [EncodedImage(picture) for picture in pictures]
    _encode(runner, images, min_encoded)
    requests = [RequestState(image, list(start_ids)) for image in images]
    logits = first = runner.prefill(requests, list(range(len(requests)))).float().cpu()
    length = runner.cached_length(requests[0])
    token_ids: list[list[int]] = [[] for _ in requests]
    for step in range(NUM_TOKENS):
        selected = logits.argmax(dim=-1).tolist()
        for ids, token_id in zip(token_ids, selected, strict=True):
            ids.append(token_id)
        if step < NUM_TOKENS - 1:
            logits = runner.decode(selected, [length + step] * len(requests)).float().cpu()
    return Captioned(first, token_ids, length)


def _step_both_ways(runner: ModelRunner, captioned: Captioned) -> tuple[Tensor, Tensor]:
    """Run the step after the first tokens eagerly and replayed; float32[n, V] each.

    `_caption` has run this step already. So its shape comes for the second time and is captured now, and the
    slots hold already what it writes.
    """
    token_ids = [ids[0] for ids in captioned.token_ids]
    lengths = [captioned.length] * len(token_ids)
    replayed = runner.decode(token_ids, lengths).float().cpu()
    return runner.decode_eagerly(token_ids, lengths).float().cpu(), replayed


def _require_near(tolerance: float, expected: Tensor, found: Tensor, what: str, remedy: str) -> None:
    """Raise `SelfTestFailure` if logits that should be equal are not, or if neither is finite.

    Log the difference in any case.
    """
    deviation = expected.std().clamp(min=1e-6)
    difference = float(((expected - found).abs().max() / deviation).item())
    logger.info("Self-test: logits %s differ by %.2g standard deviations", what, difference)
    if not (expected.isfinite().all() or found.isfinite().all()):
        raise SelfTestFailure(NOT_FINITE)
    if not difference <= tolerance:  # also fails if the difference is NaN
        raise SelfTestFailure(
            f"logits {what} must differ by at most {tolerance} standard deviations, got {difference:.3g}; "
            f"try {remedy}, or another torch build or driver for this device"
        )


def _encode(runner: ModelRunner, images: list[EncodedImage], min_encoded: int) -> None:
    """Encode the images in a batch of at least `min_encoded`, or by themselves if memory does not suffice."""
    fillers = [EncodedImage(images[0].pixels) for _ in range(min_encoded - len(images))]
    if fillers:
        outcome = catch_out_of_memory(lambda: runner.encode(images + fillers))
        if not isinstance(outcome, OutOfMemory):
            return
        logger.warning("Out of memory: %d images at once are too many: %s", min_encoded, outcome.reason)
    runner.encode(images)


def built_in_images(size_px: int) -> np.ndarray:
    """Return uint8[n, S, S, 3]: a gradient, stripes and noise, the same on every machine."""
    ramp = np.linspace(0, 255, size_px).astype(np.uint8)
    gradient = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.uint8(128)), axis=-1)
    stripes = np.broadcast_to(
        ((np.arange(size_px) // 7 % 2) * 255).astype(np.uint8)[:, None, None], gradient.shape
    )
    noise = np.random.Generator(np.random.PCG64(0)).integers(0, 256, gradient.shape, dtype=np.uint8)
    return np.ascontiguousarray(np.stack([gradient, stripes, noise]))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
