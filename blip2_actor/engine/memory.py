"""How many texts and images to process at once: what is fast, and what fits into free memory.

A decode step reads all weights once, whatever its number of rows, so many slots are better. A pass of the
vision encoder gains nothing beyond the size that fills the device. Both are reduced if memory is short: on a
CPU, a machine that swaps is slower than any small batch; on a GPU, the engine would run out of memory and
halve its limits.
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
"""Beyond about 360 rows (by arithmetic, for an H200), a decode step of a 2.7 B model in bfloat16 is limited
by computing, no longer by reading weights."""
MIN_SLOTS_CPU = 128
MIN_ENCODE_BATCH, MAX_ENCODE_BATCH = 8, 128
"""On a GPU it is always the maximum. With 128 instead of 64 images a pass, an H100 processes 12 % more
images/s in fp8, because the prefill after it is larger too, and as many in bfloat16 (blip2-opt-2.7b,
2026-11-27)."""
ENCODE_BATCH_ELEMENTS = 1 << 18
"""Image tokens times width that fill one pass on a CPU: small models take more images."""

SMALL_MODEL_ELEMENTS = 1 << 14
"""Image tokens times width up to which a model is small. With 8,320 a second core makes one image slower,
with 16,640 faster (two cores of an AMD EPYC, threads that spin, 2026-11-27)."""

MIN_SLOTS_FRACTION = 8
"""One of this many slots must remain when the longest admitted text comes."""

USED_FRACTION = 0.85
"""Fraction of free memory that is planned. The rest is for what is not counted here: workspaces,
fragmentation, growing slots."""
ENCODE_FRACTION = 0.25
"""Maximum fraction of the planned memory for the pass of the vision encoder."""
PLANNED_PROMPT_TOKENS, PLANNED_NEW_TOKENS = 32, 64
"""Slots are planned for texts of this length. They start shorter, and grow when longer texts come."""
PREFILL_WIDTHS = 16
"""Peak memory of one position of a prefill, in word embeddings: residual stream, norm, query, key and value,
and both sides of the activation with four each."""
LOGITS_BYTES = 12
"""Memory of one logit: as computed, as a log-probability in float32, and again as the score of a search."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is done at once."""

    max_slots: int
    """Texts decoded at once."""
    encode_batch: int
    """Images per pass of the encoders."""


def plan_memory(*, free_bytes: int, slot_bytes: int, image_bytes: int, wanted: Sizes) -> Sizes:
    """Return the wanted sizes, or smaller ones if they would not fit; at least one of each.

    Args:
        free_bytes: what the device has left after the weights.
        slot_bytes: memory of one running text.
        image_bytes: memory of one image while it is encoded.
    """
    usable = int(free_bytes * USED_FRACTION)
    num_images = int(usable * ENCODE_FRACTION) // image_bytes
    encode_batch = max(1, min(wanted.encode_batch, num_images))
    num_slots = (usable - encode_batch * image_bytes) // slot_bytes
    return Sizes(max_slots=max(1, min(wanted.max_slots, num_slots)), encode_batch=encode_batch)


def size_engine(model: Blip2, max_slots: int | None, encode_batch: int | None, num_passes: int) -> Sizes:
    """Return the sizes that fit a loaded model on its device.

    Args:
        max_slots: taken as it is; None chooses.
        encode_batch: taken as it is; None chooses.
        num_passes: how many passes of the encoders run at the same time.
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
    """Return how many images fill one pass of the vision encoder."""
    if device.type == "cuda":
        return MAX_ENCODE_BATCH
    return min(MAX_ENCODE_BATCH, max(MIN_ENCODE_BATCH, ENCODE_BATCH_ELEMENTS // _elements(vision)))


def is_small(model: Blip2) -> bool:
    """Return whether operations on one image are too small to be shared by several cores."""
    return _elements(model.config.vision_config) <= SMALL_MODEL_ELEMENTS


def _elements(vision: Blip2VisionConfig) -> int:
    return _tokens(vision) * vision.hidden_size


def slot_bytes(model: Blip2) -> int:
    """Return the memory of one running text.

    It counts keys and values, its part of a prefill that fills all slots, and its logits.
    """
    text = model.config.text_config
    prefix_length = model.config.num_query_tokens + PLANNED_PROMPT_TOKENS
    slot = model.language_model.new_kv_cache(1, prefix_length, PLANNED_NEW_TOKENS)
    prefill = prefix_length * PREFILL_WIDTHS * text.hidden_size * model.dtype.itemsize
    return slot.num_bytes + prefill + LOGITS_BYTES * text.vocab_size


def position_bytes(model: Blip2) -> int:
    """Return the memory of the keys and values of one position in one slot."""
    return model.language_model.new_kv_cache(1, 64, 64).num_bytes // 128


def max_positions_read(model: Blip2) -> int:
    """Return the maximum length of a text that is only read.

    It is the model's limit, or what half of the free memory holds.
    """
    return _max_positions(model, num_slots=1)


def max_positions_in_slots(model: Blip2, max_slots: int) -> int:
    """Return the maximum length of a text that is generated.

    All slots are as long as the longest text, so a long text must leave memory for a few others. Texts of the
    length that slots are planned for are always admitted; if too many slots were asked for, there will be
    fewer.
    """
    planned = model.config.num_query_tokens + PLANNED_PROMPT_TOKENS + PLANNED_NEW_TOKENS
    next_to_others = _max_positions(model, max(1, max_slots // MIN_SLOTS_FRACTION))
    return min(max_positions_read(model), max(planned, next_to_others))


def _max_positions(model: Blip2, num_slots: int) -> int:
    """Return the maximum length of a text if `num_slots` slots are as long.

    T5 has no limit of its own. The attention scores of its encoder grow with the square of the prompt.
    """
    scores_bytes = 2 * torch.float32.itemsize * model.config.text_config.num_attention_heads
    linear = num_slots * position_bytes(model)
    budget = max(0, free_bytes(model.query_tokens.device)) // 2
    in_memory = (math.sqrt(linear**2 + 4 * scores_bytes * budget) - linear) / (2 * scores_bytes)
    own = model.language_model.max_positions
    return int(in_memory) if own is None else min(own, int(in_memory))


def image_bytes(model: Blip2) -> int:
    """Return the peak memory of one image in the encoders: its pixels, and the widest place.

    The widest place is a block (residual stream, norm and both sides of the activation) or, after the last
    block, the keys and values of all cross-attentions. Attention scores count too, because a CPU stores
    them in bfloat16.
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
    """Return what can still be allocated.

    On a GPU this is what the driver and torch's cache have, within the share of this process
    (`torch.cuda.set_per_process_memory_fraction`). On a CPU it is what the machine, and the limit of
    this container, leave without swapping.
    """
    if device.type == "cuda":
        allocated = torch.cuda.memory_allocated(device)
        free, total = torch.cuda.mem_get_info(device)
        share = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        return min(free + torch.cuda.memory_reserved(device), share) - allocated
    limits = [_machine_bytes(Path("/proc/meminfo")), container_bytes(Path("/sys/fs/cgroup"))]
    return min(limit for limit in limits if limit is not None)


def container_bytes(root: Path) -> int | None:
    """Return what the limit of a control group leaves; None if there is no limit.

    The cache of files counts as free, because the kernel gives it up on demand.
    """
    for folder, names in (
        (root, ("memory.max", "memory.current", "inactive_file")),
        (root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ):
        limit, used, file_cache = names
        try:
            max_bytes = (folder / limit).read_text().strip()
            current = int((folder / used).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        return None if max_bytes == "max" else int(max_bytes) - current + int(statistics.get(file_cache, 0))
    return None


def _machine_bytes(meminfo: Path) -> int:
    """Return what Linux reports as available; on other systems, half of the physical memory."""
    try:
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return int(lines["MemAvailable"].split()[0]) * 1024


def _tokens(vision: Blip2VisionConfig) -> int:
    return (vision.image_size // vision.patch_size) ** 2 + 1
