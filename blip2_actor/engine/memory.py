"""How many texts and images at once: what is worth having, and what fits into free memory.

A decode step reads all weights once whatever the number of its rows, so many slots are wanted; a pass of the
vision encoder gains nothing beyond the size that fills the device. Both give way where memory is short: on
a CPU a machine that swaps is slower than any small batch, on a GPU the engine would only find out by
running out of memory, and halve.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Blip2VisionConfig

from blip2_actor.models.blip2 import Blip2

MAX_SLOTS_CUDA = 512
"""Where decoding a 2.7 B model in bfloat16 turns from reading weights to computing (about 360 rows on an
H200, by arithmetic)."""
MIN_SLOTS_CPU = 128
MIN_ENCODE_BATCH = {"cpu": 8, "cuda": 64}
MAX_ENCODE_BATCH = 128
ENCODE_BATCH_ELEMENTS = 1 << 18
"""Image tokens times width that are worth one pass: small models take more images."""

MIN_SLOTS_FRACTION = 8
"""Of all slots, one in so many must remain when the longest text that is admitted comes."""

USED_FRACTION = 0.85
"""Of free memory; the rest is for what is not counted here: workspaces, fragmentation, growing slots."""
ENCODE_FRACTION = 0.25
"""Of that, at most, for the pass of the vision encoder."""
PLANNED_PROMPT_TOKENS, PLANNED_NEW_TOKENS = 32, 64
"""Slots are planned for such texts, though they begin shorter, and grow when longer ones come."""
PREFILL_WIDTHS = 16
"""Widths of word embeddings that a position of a prefill keeps at its widest: residual stream, norm, query,
key and value, and both sides of the activation, four widths each."""
LOGITS_BYTES = 12
"""Of one logit: as computed, as a log-probability in float32, and once more as a search's score."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is done at once."""

    max_slots: int
    encode_batch: int


def plan_memory(*, free_bytes: int, slot_bytes: int, image_bytes: int, wanted: Sizes) -> Sizes:
    """The wanted sizes, or less where they would not fit; at least one of each.

    Args:
        free_bytes: what the device has left after the weights.
        slot_bytes: of one running text.
        image_bytes: of one image while it is encoded.
    """
    usable = int(free_bytes * USED_FRACTION)
    num_images = int(usable * ENCODE_FRACTION) // image_bytes
    encode_batch = max(1, min(wanted.encode_batch, num_images))
    num_slots = (usable - encode_batch * image_bytes) // slot_bytes
    return Sizes(max_slots=max(1, min(wanted.max_slots, num_slots)), encode_batch=encode_batch)


def size_engine(model: Blip2, max_slots: int | None, encode_batch: int | None, num_passes: int = 1) -> Sizes:
    """What fits a loaded model on its device; given numbers are taken as they are.

    Args:
        num_passes: of the encoders at the same time.
    """
    device = model.query_tokens.device
    images = encode_batch or full_encode_batch(model.config.vision_config, device)
    slots = MAX_SLOTS_CUDA if device.type == "cuda" else max(MIN_SLOTS_CPU, 2 * images)
    fitting = plan_memory(
        free_bytes=free_bytes(device),
        slot_bytes=slot_bytes(model),
        image_bytes=num_passes * image_bytes(model),
        wanted=Sizes(max_slots=max_slots or slots, encode_batch=images),
    )
    return Sizes(max_slots=max_slots or fitting.max_slots, encode_batch=encode_batch or fitting.encode_batch)


def full_encode_batch(vision: Blip2VisionConfig, device: torch.device) -> int:
    """Images that fill one pass of the vision encoder."""
    least = MIN_ENCODE_BATCH.get(device.type, MIN_ENCODE_BATCH["cpu"])
    return min(MAX_ENCODE_BATCH, max(least, ENCODE_BATCH_ELEMENTS // (_tokens(vision) * vision.hidden_size)))


def slot_bytes(model: Blip2) -> int:
    """Of one running text: keys and values, its part of a prefill that fills all slots, its logits."""
    text = model.config.text_config
    prefix_length = model.config.num_query_tokens + PLANNED_PROMPT_TOKENS
    slot = model.language_model.new_kv_cache(1, prefix_length, PLANNED_NEW_TOKENS)
    prefill = prefix_length * PREFILL_WIDTHS * text.hidden_size * model.dtype.itemsize
    return slot.num_bytes + prefill + LOGITS_BYTES * text.vocab_size


def position_bytes(model: Blip2) -> int:
    """Keys and values of one position in one slot."""
    return model.language_model.new_kv_cache(1, 64, 64).num_bytes // 128


def max_positions_read(model: Blip2) -> int:
    """Most positions of a text that is only read: the model's own limit, or half of free memory's."""
    return _longest_beside(model, 1)


def max_positions_in_slots(model: Blip2, max_slots: int) -> int:
    """Most positions of a text that is written: each slot is as long as the longest, so it must leave some.

    Texts that slots are planned for are admitted always: who asks for too many slots gets fewer.
    """
    planned = model.config.num_query_tokens + PLANNED_PROMPT_TOKENS + PLANNED_NEW_TOKENS
    beside_others = _longest_beside(model, max(1, max_slots // MIN_SLOTS_FRACTION))
    return min(max_positions_read(model), max(planned, beside_others))


def _longest_beside(model: Blip2, num_slots: int) -> int:
    """Most positions of a text in so many slots. T5 has no limit of its own; its encoder's scores grow with
    the square of the prompt."""
    scores_bytes = 2 * torch.float32.itemsize * model.config.text_config.num_attention_heads
    linear = num_slots * position_bytes(model)
    budget = max(0, free_bytes(model.query_tokens.device)) // 2
    in_memory = (math.sqrt(linear**2 + 4 * scores_bytes * budget) - linear) / (2 * scores_bytes)
    own = model.language_model.max_positions
    return int(in_memory) if own is None else min(own, int(in_memory))


def image_bytes(model: Blip2) -> int:
    """Of one image in the encoders: pixels, and the widest place of a block or of the Q-Former.

    That is residual stream, norm and both sides of the activation; or, behind the last block, the keys and
    values of every cross-attention. Attention scores count too: on a CPU in bfloat16 they are written down.
    """
    vision, qformer = model.config.vision_config, model.config.qformer_config
    tokens = _tokens(vision)
    readers = -(-qformer.num_hidden_layers // qformer.cross_attention_frequency)
    mlp = 2 * vision.hidden_size + 2 * vision.intermediate_size
    attention = 7 * vision.hidden_size + 2 * vision.num_attention_heads * tokens
    reading = vision.hidden_size + 2 * readers * qformer.hidden_size
    pixels = 3 * vision.image_size**2 * (1 + 3 * torch.float32.itemsize)
    return pixels + tokens * max(mlp, attention, reading) * model.dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """What can still be allocated: on a GPU what the driver and torch's own cache have; on a CPU what the
    machine, and this container's limit, leave without swapping."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    limits = [_machine_bytes(Path("/proc/meminfo")), container_bytes(Path("/sys/fs/cgroup"))]
    return min(limit for limit in limits if limit is not None)


def container_bytes(root: Path) -> int | None:
    """What a control group's limit leaves, the cache of files aside; None where there is no limit."""
    for folder, names in (
        (root, ("memory.max", "memory.current", "inactive_file")),
        (root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ):
        limit, used, file_cache = names
        try:
            most = (folder / limit).read_text().strip()
            current = int((folder / used).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        return None if most == "max" else int(most) - current + int(statistics.get(file_cache, 0))
    return None


def _machine_bytes(meminfo: Path) -> int:
    """Linux knows what is available; elsewhere half of the physical memory is assumed."""
    try:
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return int(lines["MemAvailable"].split()[0]) * 1024


def _tokens(vision: Blip2VisionConfig) -> int:
    return (vision.image_size // vision.patch_size) ** 2 + 1
