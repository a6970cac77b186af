"""The canary: at start, built-in images captioned alone and in a batch, before anybody's are.

A kernel, a library or a device that makes neighbours disturb each other shows here, and so does a recorded
step that does something else than the step itself. What came out is also remembered per checkpoint, dtype
and device, so that an upgrade that changes captions is reported.
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

from blip2_actor.checkpoints.download import write_whole
from blip2_actor.engine.model_runner import ModelRunner
from blip2_actor.engine.out_of_memory import OutOfMemory, catch_out_of_memory
from blip2_actor.engine.request_state import EncodedImage, RequestState

logger = logging.getLogger(__name__)

NUM_IMAGES = 3
NUM_TOKENS = 4
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Largest difference of logits that should be equal, over their standard deviation: far above what
rounding does (float32: 2e-6 on a random model of 12 layers, AVX512 CPU, 2026-11-23), far below a leak."""


@dataclass(frozen=True)
class SelfTestRecord:
    """What came out, and on what."""

    digest: str
    """Of the captions' token ids."""
    torch: str
    transformers: str
    device: str


class SelfTestFailure(RuntimeError):
    """The same image gave different results, alone and in a batch or replayed and not: no caption can be
    trusted."""


class Captioned(NamedTuple):
    """What `_caption` leaves in slots 0..n-1."""

    first_logits: Tensor
    """float32[n, V], of the first tokens."""
    token_ids: list[list[int]]
    length: int
    """Cached positions in front of the first token."""


def check(runner: ModelRunner, start_ids: Sequence[int], size_px: int) -> SelfTestRecord:
    """Caption the built-in images alone and together; compiled encoders are compiled by it.

    Raises:
        SelfTestFailure: results differ by more than the dtype explains.
        ValueError: memory does not suffice even for these images.
    """
    pictures = _pictures(size_px)
    full_batch = runner.encoders.compiled_batch or 0
    try:
        together = _caption(runner, pictures, start_ids, full_batch)
        if runner.replays:
            _require_near(
                runner.dtype,
                *_step_both_ways(runner, together),
                "of a step, plain and replayed",
                "--skip-cuda-graphs",
            )
        each = [_caption(runner, pictures[i : i + 1], start_ids).first_logits for i in range(NUM_IMAGES)]
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"max_slots and encode_batch must fit into memory, got {runner.num_slots} texts at once and "
            f"{error}; lower --max-slots or --encode-batch"
        ) from error
    alone = torch.cat(each)
    _require_near(
        runner.dtype, together.first_logits, alone, "of an image, alone and in a batch", "--dtype float32"
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
    """Remember a record, and say what has changed where its digest is not that of the last start.

    Args:
        folder: where records are kept, one file per checkpoint, dtype and device.
    """
    key = hashlib.sha256(f"{checkpoint_digest} {dtype} {record.device}".encode()).hexdigest()[:24]
    path = folder / f"{key}.json"
    last = _read_record(path)
    write_whole(path, json.dumps(asdict(record)))
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
    """None where there is none, or none that can be read: it is only a comparison that is lost."""
    try:
        return SelfTestRecord(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _caption(
    runner: ModelRunner, pictures: np.ndarray, start_ids: Sequence[int], least_encoded: int = 0
) -> Captioned:
    """First logits and a few greedy tokens of each image, in slots 0..n-1."""
    images = [EncodedImage(picture) for picture in pictures]
    _encode(runner, images, least_encoded)
    jobs = [RequestState(image, list(start_ids)) for image in images]
    logits = first = runner.prefill(jobs, list(range(len(jobs)))).float().cpu()
    length = runner.cached_length(jobs[0])
    found: list[list[int]] = [[] for _ in jobs]
    for step in range(NUM_TOKENS):
        chosen = logits.argmax(dim=-1).tolist()
        for row, token_id in zip(found, chosen, strict=True):
            row.append(token_id)
        if step < NUM_TOKENS - 1:
            logits = runner.decode(chosen, [length + step] * len(jobs)).float().cpu()
    return Captioned(first, found, length)


def _step_both_ways(runner: ModelRunner, captioned: Captioned) -> tuple[Tensor, Tensor]:
    """The step behind the first tokens, plain and replayed: float32[n, V] each.

    The captions have taken it already, so its shape comes again and is recorded; and what it leaves in the
    slots is there.
    """
    token_ids = [ids[0] for ids in captioned.token_ids]
    lengths = [captioned.length] * len(token_ids)
    replayed = runner.decode(token_ids, lengths).float().cpu()
    return runner.decode_plainly(token_ids, lengths).float().cpu(), replayed


def _require_near(dtype: torch.dtype, expected: Tensor, found: Tensor, what: str, remedy: str) -> None:
    """Logits that should be equal; how far they are from it is said either way."""
    spread = expected.std().clamp(min=1e-6)
    difference = float(((expected - found).abs().max() / spread).item())
    logger.info("Logits %s differ by %.2g of their deviation in %s", what, difference, dtype)
    if not difference <= TOLERANCE[dtype]:  # also where it is not a number
        raise SelfTestFailure(
            f"logits {what} must differ by at most {TOLERANCE[dtype]} of their deviation in {dtype}, got "
            f"{difference:.3g}; try {remedy}, or another torch build or driver for this device"
        )


def _encode(runner: ModelRunner, images: list[EncodedImage], least_encoded: int) -> None:
    """In a batch that is filled up, or alone where memory does not suffice for that."""
    fillers = [EncodedImage(images[0].pixels) for _ in range(least_encoded - len(images))]
    if fillers:
        found = catch_out_of_memory(lambda: runner.encode(images + fillers))
        if not isinstance(found, OutOfMemory):
            return
        logger.warning("Out of memory: %d images at a time are too many (%s)", least_encoded, found.reason)
    runner.encode(images)


def _pictures(size_px: int) -> np.ndarray:
    """uint8[n, S, S, 3]: a gradient, stripes, and noise; the same everywhere."""
    ramp = np.linspace(0, 255, size_px).astype(np.uint8)
    gradient = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.uint8(128)), axis=-1)
    stripes = np.broadcast_to(
        ((np.arange(size_px) // 7 % 2) * 255).astype(np.uint8)[:, None, None], gradient.shape
    )
    noise = np.random.Generator(np.random.PCG64(0)).integers(0, 256, gradient.shape, dtype=np.uint8)
    return np.ascontiguousarray(np.stack([gradient, stripes, noise]))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
