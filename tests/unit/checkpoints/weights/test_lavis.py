"""Checkpoints of LAVIS: each trained tensor replaces its counterpart, and the frozen ones stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from blip2_actor import EngineConfig, load_for_training, load_retrieval_for_training, save_model
from blip2_actor.checkpoints.checkpoint import resolve
from blip2_actor.checkpoints.loading import stored_tensors
from blip2_actor.checkpoints.weights.stored_tensor import read_whole
from blip2_actor.testing import save_tiny_checkpoint, save_tiny_retrieval_checkpoint

Tensors = dict[str, Tensor]

NAMES = {
    "query_tokens": "query_tokens",
    "visual_encoder.cls_token": "vision_model.embeddings.class_embedding",
    "visual_encoder.pos_embed": "vision_model.embeddings.position_embedding",
    "visual_encoder.patch_embed.proj.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual_encoder.patch_embed.proj.bias": "vision_model.embeddings.patch_embedding.bias",
    "visual_encoder.blocks.2.norm1.weight": "vision_model.encoder.layers.2.layer_norm1.weight",
    "visual_encoder.blocks.2.norm2.bias": "vision_model.encoder.layers.2.layer_norm2.bias",
    "visual_encoder.blocks.0.attn.qkv.weight": "vision_model.encoder.layers.0.self_attn.qkv.weight",
    "visual_encoder.blocks.0.attn.proj.bias": "vision_model.encoder.layers.0.self_attn.projection.bias",
    "visual_encoder.blocks.1.mlp.fc1.weight": "vision_model.encoder.layers.1.mlp.fc1.weight",
    "visual_encoder.blocks.1.mlp.fc2.bias": "vision_model.encoder.layers.1.mlp.fc2.bias",
    "ln_vision.weight": "vision_model.post_layernorm.weight",
    "Qformer.bert.embeddings.LayerNorm.bias": "qformer.layernorm.bias",
    "Qformer.bert.encoder.layer.0.attention.self.query.weight": (
        "qformer.encoder.layer.0.attention.attention.query.weight"
    ),
    "Qformer.bert.encoder.layer.0.attention.output.LayerNorm.weight": (
        "qformer.encoder.layer.0.attention.output.LayerNorm.weight"
    ),
    "Qformer.bert.encoder.layer.2.crossattention.self.value.bias": (
        "qformer.encoder.layer.2.crossattention.attention.value.bias"
    ),
    "Qformer.bert.encoder.layer.2.crossattention.output.dense.bias": (
        "qformer.encoder.layer.2.crossattention.output.dense.bias"
    ),
    "Qformer.bert.encoder.layer.3.intermediate_query.dense.weight": (
        "qformer.encoder.layer.3.intermediate_query.dense.weight"
    ),
    "Qformer.bert.encoder.layer.3.output_query.LayerNorm.bias": (
        "qformer.encoder.layer.3.output_query.LayerNorm.bias"
    ),
}
"""Names in LAVIS's `Blip2OPT` and `Blip2T5`, and in transformers."""
CAPTIONING = {
    "opt": NAMES | {"opt_proj.weight": "language_projection.weight"},
    "t5": NAMES | {"t5_proj.bias": "language_projection.bias"},
}
RETRIEVAL = NAMES | {
    "Qformer.bert.embeddings.word_embeddings.weight": "embeddings.word_embeddings.weight",
    "Qformer.bert.embeddings.position_embeddings.weight": "embeddings.position_embeddings.weight",
    "Qformer.bert.encoder.layer.1.intermediate.dense.bias": "qformer.encoder.layer.1.intermediate.dense.bias",
    "vision_proj.weight": "vision_projection.weight",
    "text_proj.bias": "text_projection.bias",
    "itm_head.weight": "itm_head.weight",
}
"""The same for its `Blip2Qformer`."""
ONLY_IN_TRAINING = ("temp", "Qformer.cls.predictions.bias", "Qformer.bert.embeddings.position_ids")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {
        language: save_tiny_checkpoint(tmp_path_factory.mktemp(language), language) for language in CAPTIONING
    }
    return folders | {"retrieval": save_tiny_retrieval_checkpoint(tmp_path_factory.mktemp("retrieval"))}


def train(base: Path, names: dict[str, str]) -> tuple[Tensors, Tensors]:
    """Return the tensors that LAVIS stores, and those of the trained model under transformers' names."""
    before = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    trained = {name: torch.randn(before[theirs].shape, generator=generator) for name, theirs in names.items()}
    after = before | {theirs: trained[name] for name, theirs in names.items()}
    query, value = torch.randn(2, len(before["vision_model.encoder.layers.1.self_attn.qkv.bias"]) // 3)
    trained |= {"visual_encoder.blocks.1.attn.q_bias": query, "visual_encoder.blocks.1.attn.v_bias": value}
    bias = torch.cat([query, torch.zeros_like(query), value])
    after["vision_model.encoder.layers.1.self_attn.qkv.bias"] = bias
    return trained | {name: torch.zeros(1) for name in ONLY_IN_TRAINING}, after


def write(path: Path, tensors: Tensors) -> Path:
    """Write a file as LAVIS's runner does."""
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-5, "params": [0]}]}
    rest: dict[str, Any] = {"config": {"run": {"seed": 42}}, "scaler": {"scale": 65536.0}, "epoch": 3}
    torch.save({"model": tensors, "optimizer": optimizer, **rest}, path)
    return path


@pytest.mark.parametrize("language", CAPTIONING)
def test_a_captioning_model_after_its_training(language: str, bases: dict[str, Path], tmp_path: Path) -> None:
    trained, expected = train(bases[language], CAPTIONING[language])
    path = write(tmp_path / "checkpoint_best.pth", trained)
    checkpoint = resolve(str(bases[language]), adapter=str(path))
    found = {name: read_whole(stored) for name, stored in stored_tensors(checkpoint).items()}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)

    model = load_for_training(bases[language], adapter=path, device="cpu")
    save_model(model, tmp_path / "converted", like=bases[language])
    loaded = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "converted").state_dict()
    assert expected.keys() <= loaded.keys()
    torch.testing.assert_close({name: loaded[name] for name in expected}, expected, rtol=0, atol=0)


def test_a_retrieval_model_after_its_training(bases: dict[str, Path], tmp_path: Path) -> None:
    trained, expected = train(bases["retrieval"], RETRIEVAL)
    path = write(tmp_path / "checkpoint_4.pth", trained)
    model = load_retrieval_for_training(bases["retrieval"], adapter=path, device="cpu")
    save_model(model, tmp_path / "converted", like=bases["retrieval"])
    loaded = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "converted").state_dict()
    assert expected.keys() <= loaded.keys()
    torch.testing.assert_close({name: loaded[name] for name in expected}, expected, rtol=0, atol=0)


def test_it_is_part_of_the_content(bases: dict[str, Path], tmp_path: Path) -> None:
    trained, _ = train(bases["opt"], CAPTIONING["opt"])
    path = write(tmp_path / "a.pth", trained)
    plain = EngineConfig(model=str(bases["opt"]), device="cpu").info().digest
    first = EngineConfig(model=str(bases["opt"]), adapter=str(path), device="cpu").info().digest
    write(path, trained | {"query_tokens": torch.zeros_like(trained["query_tokens"])})
    second = EngineConfig(model=str(bases["opt"]), adapter=str(path), device="cpu").info().digest
    assert len({plain, first, second}) == 3
    assert first.startswith(plain)


def test_tensors_alone_are_read_too(bases: dict[str, Path], tmp_path: Path) -> None:
    trained, expected = train(bases["opt"], CAPTIONING["opt"])
    torch.save(trained, tmp_path / "state_dict.pth")
    checkpoint = resolve(str(bases["opt"]), adapter=str(tmp_path / "state_dict.pth"))
    found = {name: read_whole(stored) for name, stored in stored_tensors(checkpoint).items()}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


REFUSALS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "another language model": (
        lambda t: {"model": t | {"opt_proj.weight": torch.ones(8, 16)}},
        r"language_projection\.weight has the shape \[8, 16\], and \[32, 16\] in the model; set --model",
    ),
    "another task": (
        lambda t: {"model": t | {"itm_head.weight": torch.ones(2, 16)}},
        r"holds 1 tensors that the model does not have, such as itm_head\.weight; set --model to",
    ),
    "another vision encoder": (
        lambda t: {"model": t | {"visual_encoder.ln_pre.weight": torch.ones(24)}},
        r"does not have, such as visual_encoder\.ln_pre\.weight",
    ),
    "half of the biases": (
        lambda t: {"model": {n: x for n, x in t.items() if not n.endswith("v_bias")}},
        r"does not have, such as vision_model\.encoder\.layers\.1\.self_attn\.q_bias",
    ),
    "nothing": (lambda t: {"model": {}}, "must hold the tensors that LAVIS has trained, got none"),
    "no tensors": (lambda t: {"epoch": 3}, "must hold tensors by name, got entries epoch"),
    "a program": (lambda t: {"model": t, "config": Path("x")}, "pickle that may run a program"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_file_for_another_model_is_refused(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    trained, _ = train(bases["opt"], CAPTIONING["opt"])
    change, message = REFUSALS[case]
    torch.save(change(trained), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        load_for_training(bases["opt"], adapter=tmp_path / "x.pth", device="cpu")
