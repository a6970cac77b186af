"""Damaged or contradictory files of a checkpoint are refused by name, before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from blip2_actor import EngineConfig
from blip2_actor.testing import save_tiny_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_tiny_checkpoint(tmp_path_factory.mktemp(name), name) for name in ("opt", "t5")}


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return shutil.copytree(folders[getattr(request, "param", "opt")], tmp_path / "checkpoint")


def info(folder: Path) -> Any:
    return EngineConfig(model=str(folder), device="cpu", dtype="float32").info()


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[1]", b'{"a": "\xff"}'], ids=str)
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"]
)
def test_a_damaged_file_is_named(copied: Path, name: str, content: bytes) -> None:
    """The error used to be a JSONDecodeError that named no file, or an AttributeError."""
    (copied / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"checkpoint/{name} must .*; fetch it again"):
        info(copied)


@pytest.mark.parametrize(
    ("copied", "field", "value", "message"),
    [
        ("opt", "vision_config.num_attention_heads", 7, r"divisor of hidden_size \(24\), got 7"),
        ("opt", "text_config.num_attention_heads", 0, "text_config.num_attention_heads in .*, got 0"),
        ("opt", "qformer_config.cross_attention_frequency", 0, "at least 1, got 0"),
        ("opt", "vision_config.patch_size", 0, "must be a number of pixels, got 0"),
        ("opt", "vision_config.image_size", [28, 28], r"must be a number of pixels, .* got \[28, 28\]"),
        ("opt", "text_config.hidden_size", "x", r"config\.json must describe a BLIP-2, got .*hidden_size"),
        ("opt", "text_config.bos_token_id", -1, "bos_token_id in text_config in .*, got -1"),
        ("opt", "text_config.bos_token_id", 10**6, "bos_token_id in text_config in .*, got 1000000"),
        ("t5", "text_config.bos_token_id", -1, "bos_token_id in text_config in .*, got -1"),
        ("t5", "text_config.bos_token_id", [1], r"bos_token_id in text_config in .*, got \[1\]"),
        ("t5", "text_config.decoder_start_token_id", [1], r"decoder_start_token_id in .*, got \[1\]"),
        ("t5", "text_config.decoder_start_token_id", -1, "decoder_start_token_id in .*, got -1"),
        ("t5", "text_config.relative_attention_num_buckets", 3, "num_buckets in .* at least 4, got 3"),
        ("t5", "text_config.relative_attention_max_distance", 16, r"max_distance .* \(32\), got 16"),
        ("t5", "text_config.d_kv", -1, "text_config.d_kv in .* must be at least 1, got -1"),
        ("opt", "text_config.ffn_dim", -1, "text_config.ffn_dim in .* must be at least 1, got -1"),
        ("opt", "vision_config.intermediate_size", -1, "vision_config.intermediate_size in .*, got -1"),
        ("opt", "num_query_tokens", -1, "num_query_tokens in .* must be at least 1, got -1"),
        ("opt", "num_query_tokens", 1 << 40, "num_query_tokens in .* at most 65536, got 1099511627776"),
        ("opt", "vision_config.image_size", 1 << 40, "vision_config.image_size in .* at most 8192, got 1099"),
        ("opt", "qformer_config.hidden_size", 1 << 40, "qformer_config.hidden_size in .* 65536, got 10995"),
        ("opt", "text_config.num_hidden_layers", 1 << 40, "num_hidden_layers in .* at most 1024, got 10995"),
        ("t5", "text_config.d_ff", 1 << 40, "text_config.d_ff in .* at most 65536, got 1099511627776"),
        ("opt", "architectures", 5, r"architectures(' with value| in .* must be a list of names, got) 5"),
        ("opt", "quantization_config", "x", "must not be quantized, got quantization_config .of 'x'."),
        ("opt", "vision_config.hidden_act", "silu", "vision_config.hidden_act in .* one of gelu, .*'silu'"),
        ("opt", "qformer_config.hidden_act", "silu", "qformer_config.hidden_act in .*, got 'silu'"),
        ("opt", "text_config.activation_function", "silu", "text_config.activation_function .*, got 'silu'"),
        ("t5", "text_config.dense_act_fn", "silu", "text_config.dense_act_fn in .*, got 'silu'"),
        ("t5", "text_config.dense_act_fn", [], r"text_config.dense_act_fn in .*, got \[\]"),
    ],
    indirect=["copied"],
)
def test_a_contradiction_is_refused_by_name(copied: Path, field: str, value: object, message: str) -> None:
    """The engine used to fail while it was built, or at its first request, with an error about tensors."""
    part, _, name = field.rpartition(".")
    config = json.loads((copied / "config.json").read_text())
    (config[part] if part else config)[name] = value
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        info(copied)
