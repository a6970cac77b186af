"""The numbers of slots and images: as wanted if they fit, fewer if memory is short, and at least one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig, OPTConfig, T5Config

from blip2_actor.engine import memory
from blip2_actor.engine.memory import (
    Sizes,
    container_bytes,
    free_bytes,
    full_encode_batch,
    image_bytes,
    plan_memory,
    size_engine,
    slot_bytes,
)
from blip2_actor.models.blip2 import Blip2

GIB = 1 << 30
WANTED = Sizes(max_slots=512, encode_batch=64)


def plan(free: int, wanted: Sizes = WANTED) -> Sizes:
    return plan_memory(free_bytes=free, slot_bytes=40 << 20, image_bytes=14 << 20, wanted=wanted)


def test_plenty_of_memory_gives_what_is_wanted() -> None:
    assert plan(70 * GIB) == WANTED


def test_short_memory_gives_fewer_slots_before_fewer_images() -> None:
    sizes = plan(8 * GIB)
    assert sizes.encode_batch == 64
    assert 100 < sizes.max_slots < 200


def test_the_plan_fits() -> None:
    """The plan must leave some memory free, whatever the size of the device."""
    for tenths in range(10, 400):
        free = tenths * GIB // 10
        sizes = plan(free)
        assert sizes.max_slots * (40 << 20) + sizes.encode_batch * (14 << 20) <= 0.85 * free


def test_no_memory_still_runs_one_by_one() -> None:
    assert plan(1 << 20) == Sizes(max_slots=1, encode_batch=1)
    assert plan(-1) == Sizes(max_slots=1, encode_batch=1)


def test_a_cpu_takes_more_images_of_a_smaller_model_and_a_gpu_as_many_of_each() -> None:
    published, small = Blip2VisionConfig(), Blip2VisionConfig(hidden_size=128, image_size=64, patch_size=8)
    tiny = Blip2VisionConfig(hidden_size=16, image_size=32, patch_size=8)
    on_cpu, on_gpu = (
        [full_encode_batch(config, torch.device(device)) for config in (published, small, tiny)]
        for device in ("cpu", "cuda")
    )
    assert on_cpu == [8, 31, 128]
    assert on_gpu == [128, 128, 128]


def full_size(text: OPTConfig | T5Config) -> Blip2:
    """A model of a published shape, on the meta device."""
    config = Blip2Config(
        vision_config=Blip2VisionConfig(),
        qformer_config=Blip2QFormerConfig(),
        text_config=text,
        num_query_tokens=32,
    )
    with torch.device("meta"):
        return Blip2(config).to(torch.bfloat16)


def test_a_slot_of_the_published_models_needs_what_arithmetic_says() -> None:
    """OPT 2.7B: keys and values of 32 layers of 2560 at 128 positions of 2 bytes are 40 MiB; a prefill adds
    to it."""
    opt = OPTConfig(
        hidden_size=2560, num_hidden_layers=32, ffn_dim=10240, num_attention_heads=32, vocab_size=50304
    )
    assert 40 << 20 < slot_bytes(full_size(opt)) < 50 << 20
    t5 = T5Config(d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32, vocab_size=32128)
    assert 24 << 20 < slot_bytes(full_size(t5)) < 32 << 20
    assert 8 << 20 < image_bytes(full_size(opt)) < 24 << 20


def test_given_sizes_are_taken_and_the_others_fit_what_they_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    model = full_size(OPTConfig(hidden_size=2560, num_hidden_layers=32, num_attention_heads=32))
    monkeypatch.setattr(memory, "free_bytes", lambda _: GIB)
    chosen = size_engine(model, None, None, 1)
    assert 1 < chosen.max_slots < 20 and chosen.encode_batch < 20
    assert size_engine(model, 700, 500, 1) == Sizes(max_slots=700, encode_batch=500)
    fewer = size_engine(model, None, 500, 1)
    assert fewer.encode_batch == 500 and fewer.max_slots <= chosen.max_slots


def test_a_container_with_a_limit_has_what_the_limit_leaves(tmp_path: Path) -> None:
    """The cache of files, such as weights, is freed on demand and must not count as used."""
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.stat").write_text("anon 250000\ninactive_file 300000\n")
    assert container_bytes(tmp_path) == 700000
    (tmp_path / "memory.max").write_text("max\n")
    assert container_bytes(tmp_path) is None
    assert container_bytes(tmp_path / "elsewhere") is None


def test_an_older_container_too(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("1000000\n")
    (folder / "memory.usage_in_bytes").write_text("600000\n")
    (folder / "memory.stat").write_text("total_inactive_file 100000\n")
    assert container_bytes(tmp_path) == 500000


def test_this_machine_has_some_memory() -> None:
    assert 64 << 20 < free_bytes(torch.device("cpu")) < 1 << 50
