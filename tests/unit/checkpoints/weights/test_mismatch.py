"""Weights that do not fit their config.json cause a short message with the likely reason and a remedy."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip2_actor import EngineConfig
from blip2_actor.checkpoints.checkpoint import Checkpoint
from blip2_actor.checkpoints.loading import load_model
from blip2_actor.testing import save_tiny_checkpoint

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_tiny_checkpoint(tmp_path_factory.mktemp(name), name) for name in ("opt", "t5")}


def refusal(folder: Path, tensors: Tensors) -> str:
    """Return the message about weights that replace a folder's own."""
    original = (folder / "model.safetensors").read_bytes()
    try:
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(ValueError, match="do not match its config") as refused:
            load_model(Checkpoint(folder), torch.device("cpu"), torch.float32)
        return str(refused.value)
    finally:
        (folder / "model.safetensors").write_bytes(original)


def quantized(tensors: Tensors) -> Tensors:
    scales = {name.replace("weight", "SCB"): torch.ones(32) for name in tensors if "q_proj.weight" in name}
    return tensors | scales


def wrapped_by_peft(tensors: Tensors) -> Tensors:
    return {name.replace("q_proj.", "q_proj.base_layer."): tensor for name, tensor in tensors.items()}


REASONS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a prefix": (lambda t: {f"net.{k}": v for k, v in t.items()}, "all their names begin alike"),
    "compiled": (
        lambda t: {k.replace("model.decoder", "_orig_mod.model.decoder"): v for k, v in t.items()},
        "save the module that it wraps",
    ),
    "int8": (quantized, "they are quantized: name the model"),
    "peft": (wrapped_by_peft, r"merge_and_unload\(\) before save_pretrained"),
    "lavis": (lambda t: {"Qformer.bert.encoder.layer.0.x": torch.ones(1)}, "and --adapter to this file"),
    "trained parts": (
        lambda t: {k: v for k, v in t.items() if k.startswith(("qformer", "language_proj", "query"))},
        "save the whole model",
    ),
    "sizes": (lambda t: {k: torch.cat([v, v]) for k, v in t.items()}, "sizes are those of another model"),
    "one more": (lambda t: t | {"x": torch.ones(1)}, "both are of the same model"),
}


@pytest.mark.parametrize("case", REASONS)
def test_the_message_is_short_and_names_the_likely_reason(
    case: str, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """There used to be a line per tensor: 1,247 of them and as many again for a published checkpoint."""
    change, reason = REASONS[case]
    with caplog.at_level(logging.DEBUG, "blip2_actor.checkpoints"):
        message = refusal(folders["opt"], change(load_file(folders["opt"] / "model.safetensors")))
    lines = message.splitlines()
    assert reason.replace("\\", "") in lines[0]
    assert len(lines) <= 10
    assert max(map(len, lines)) < 400
    counts = [int(word) for word in lines[0].partition("(")[2].replace(",", "").split() if word.isdigit()]
    assert len(caplog.messages) >= sum(counts[:1]), "the debug log lists every name"


@pytest.mark.parametrize(("config", "weights", "found"), [("opt", "t5", "a T5"), ("t5", "opt", "an OPT")])
def test_another_language_model_is_named(
    config: str, weights: str, found: str, folders: dict[str, Path]
) -> None:
    tensors = load_file(folders[weights] / "model.safetensors")
    assert f"language model is {found}" in refusal(folders[config], tensors)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_checkpoint_is_refused_before_its_weights_are_read(bits: int, tmp_path: Path) -> None:
    """The tensors of bitsandbytes used to be reported as unexpected, without mentioning quantization."""
    folder = save_tiny_checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    engine = EngineConfig(model=str(folder), device="cpu")
    for ask in (engine.info, engine.build):
        with pytest.raises(
            ValueError, match=rf"quantization_config \(of bitsandbytes, {bits} bits\).*name the"
        ):
            ask()


def test_weights_in_a_file_that_config_json_names_are_refused(tmp_path: Path) -> None:
    """transformers would read that file, but the engine another one."""
    folder = save_tiny_checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    with pytest.raises(ValueError, match=r"transformers_weights .*got 'other\.safetensors'; rename"):
        EngineConfig(model=str(folder), device="cpu").info()
