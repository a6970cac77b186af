"""Where an adapter may be stored, what identifies it, and which adapters are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from blip2_actor import EngineConfig
from blip2_actor.checkpoints.checkpoint import resolve
from blip2_actor.checkpoints.loading import load_model
from blip2_actor.checkpoints.weights import safetensors_file
from blip2_actor.checkpoints.weights.adapter import MergedTensor
from blip2_actor.checkpoints.weights.adapter_config import AdapterConfig
from blip2_actor.checkpoints.weights.stored_tensor import read_whole
from blip2_actor.checkpoints.weights.weight_files import list_weights
from blip2_actor.testing import save_tiny_checkpoint

LAYER = "language_model.model.decoder.layers.0"
MATRICES = {
    f"base_model.model.{LAYER}.self_attn.q_proj.lora_A.weight": torch.ones(4, 32),
    f"base_model.model.{LAYER}.self_attn.q_proj.lora_B.weight": torch.ones(32, 4),
}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("base"))


def write_adapter(folder: Path, tensors: dict[str, Tensor] = MATRICES, **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def query_weight(model: str, adapter: str | None = None) -> Tensor:
    """Load a model; return the part of a fused layer that the adapter of these tests changes."""
    loaded = load_model(resolve(model, adapter=adapter), CPU, torch.float32)
    weight: Tensor = loaded.language_model.get_parameter("layers.0.qkv.weight")
    return weight[:32]


def test_an_adapter_is_found_in_the_folder_alone_or_by_its_setting(base: Path, tmp_path: Path) -> None:
    """An adapter next to weights used to be ignored silently, and one alone was no checkpoint."""
    expected = query_weight(str(base)) + 2 / 4 * 4
    inside = tmp_path / "inside"
    shutil.copytree(base, inside)
    write_adapter(inside)
    alone = write_adapter(tmp_path / "alone", base_model_name_or_path=str(base))
    separate = write_adapter(tmp_path / "separate")
    for model, adapter in ((inside, None), (alone, None), (base, str(separate))):
        torch.testing.assert_close(query_weight(str(model), adapter), expected)


@pytest.mark.parametrize("piece_bytes", [16, 20, 64, 1000])
def test_the_term_is_added_to_the_right_elements_of_each_piece(
    piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of large matrices begin and end inside a row."""
    monkeypatch.setattr(safetensors_file, "PIECE_BYTES", piece_bytes)
    weight, left, right = torch.randn(5, 3, 2), torch.randn(5, 2), torch.randn(2, 6)
    save_file({"weight": weight}, tmp_path / "model.safetensors")
    stored = list_weights(tmp_path)["weight"]
    merged = read_whole(MergedTensor(stored, left, right, 0.5))
    torch.testing.assert_close(merged, weight + 0.5 * (left @ right).view(5, 3, 2))


def test_the_digest_follows_the_adapter(base: Path, tmp_path: Path) -> None:
    """A run must not resume with another adapter, nor without the one that it had."""
    adapter = write_adapter(tmp_path / "adapter")
    copy = write_adapter(tmp_path / "copy")

    def digest(adapter: Path | None) -> str:
        return (
            EngineConfig(model=str(base), device="cpu", adapter=str(adapter) if adapter else None)
            .info()
            .digest
        )

    plain, adapted = digest(None), digest(adapter)
    assert adapted == digest(copy) != plain
    assert adapted.startswith(f"{plain}+")
    write_adapter(copy, lora_alpha=3)
    assert digest(copy) not in (plain, adapted)


def test_two_adapters_are_refused(base: Path, tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    shutil.copytree(base, inside)
    write_adapter(inside)
    adapter = write_adapter(tmp_path / "adapter", base_model_name_or_path=str(inside))
    for config in (
        EngineConfig(model=str(inside), adapter=str(adapter), device="cpu"),
        EngineConfig(model=str(adapter), device="cpu"),
    ):
        with pytest.raises(ValueError, match="adapter must be left out for a model with an adapter"):
            config.info()


def test_an_adapter_of_an_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    """The message used to say to leave out an adapter that nobody had given."""
    inner, itself = tmp_path / "inner", tmp_path / "itself"
    write_adapter(inner, base_model_name_or_path=str(base))
    write_adapter(itself, base_model_name_or_path=str(itself))
    outer = write_adapter(tmp_path / "outer", base_model_name_or_path=str(inner))
    for config, alone in (
        (EngineConfig(model=str(itself), device="cpu"), itself),
        (EngineConfig(model=str(outer), device="cpu"), inner),
        (EngineConfig(model=str(inner), adapter=str(outer), device="cpu"), inner),
    ):
        with pytest.raises(
            ValueError, match=f"must adapt a model, got {alone}, which holds an adapter alone"
        ):
            config.info()


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "plain LoRA, got use_dora = True; merge it"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "must be LORA, got 'PROMPT_TUNING'"),
    "ia3": ({"peft_type": "IA3"}, "must be LORA, got 'IA3'"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights .* got 'pissa_niter_4'"),
    "layers repeated": ({"layer_replication": [[0, 2], [1, 3]]}, r"got layer_replication = \[\[0, 2\]"),
    "tokens": ({"trainable_token_indices": [3]}, "got trainable_token_indices"),
    "of the future": ({"use_wonder": True, "with_magic": 0}, "got use_wonder = True;"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_what_cannot_be_merged_is_refused_by_info(case: str, base: Path, tmp_path: Path) -> None:
    fields, message = FIELDS[case]
    adapter = write_adapter(tmp_path / "adapter", **fields)
    with pytest.raises(ValueError, match=message):
        EngineConfig(model=str(base), adapter=str(adapter), device="cpu").info()


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "another model": (
        lambda t: {k.replace("decoder.", "decoder.block."): v for k, v in t.items()},
        r"that it does not have, such as .*decoder\.block\.",
    ),
    "other widths": (
        lambda t: {k: torch.cat([v, v], 1 if "A" in k else 0) for k, v in t.items()},
        "do not fit",
    ),
    "another rank": (
        lambda t: {k: v.narrow(0 if "lora_A" in k else 1, 0, 2) for k, v in t.items()},
        r"the rank 4 of adapter_config\.json, got 2",
    ),
    "a bias of a layer without": (
        lambda t: (
            {k.replace(f"{LAYER}.self_attn.q_proj", "language_model.lm_head"): v for k, v in t.items()}
            | {"base_model.model.language_model.lm_head.lora_B.bias": torch.ones(264)}
        ),
        r"changes 1 tensors that it does not have, such as language_model\.lm_head\.bias",
    ),
    "nothing": (lambda t: {}, "must hold the tensors of an adapter, got none"),
    "one matrix": (lambda t: dict(list(t.items())[:1]), "matrices A and B of"),
    "not gathered": (lambda t: {k: torch.empty(0) for k in t}, r"matrices A and B of .*\[\[0\], \[0\]\]"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_matrices_that_do_not_fit_are_refused_by_name(case: str, base: Path, tmp_path: Path) -> None:
    change, message = TENSORS[case]
    tensors = {name: tensor.contiguous() for name, tensor in change(MATRICES).items()}
    adapter = write_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(ValueError, match=message):
        query_weight(str(base), str(adapter))


def test_a_rank_of_0_is_refused(base: Path, tmp_path: Path) -> None:
    """The scaling used to divide by it."""
    empty = {k: v[:0] if "lora_A" in k else v[:, :0].contiguous() for k, v in MATRICES.items()}
    adapter = write_adapter(tmp_path / "adapter", empty, r=0)
    with pytest.raises(ValueError, match=r"matrices A and B of .*q_proj, got \[\[0, 32\], \[32, 0\]\]"):
        query_weight(str(base), str(adapter))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_alpha": None}, r"must give a number for .*q_proj, got None"),
        ({"alpha_pattern": {"q_proj": "8"}}, r"must give a number for .*q_proj, got '8'"),
        ({"rank_pattern": {"(": 3}}, r"rank_pattern in .*adapter_config\.json must be an object .*, got \{"),
        ({"rank_pattern": ["q_proj"]}, r"rank_pattern in .* must be an object .*, got \['q_proj'\]"),
    ],
    ids=str,
)
def test_values_that_cannot_be_used_are_refused_by_name(
    fields: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", **fields)
    with pytest.raises(ValueError, match=message):
        query_weight(str(base), str(adapter))


def test_the_shared_embeddings_of_a_t5_are_refused(tmp_path: Path) -> None:
    """PEFT would change what the encoder reads and not what the decoder reads; both are one tensor here."""
    base = save_tiny_checkpoint(tmp_path / "base", "t5")
    matrices = {"lora_embedding_A": torch.ones(4, 264), "lora_embedding_B": torch.ones(32, 4)}
    tensors = {f"base_model.model.language_model.shared.{name}": tensor for name, tensor in matrices.items()}
    adapter = write_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(ValueError, match="must not change the embeddings of a T5"):
        load_model(resolve(str(base), adapter=str(adapter)), CPU, torch.float32)


def test_a_folder_that_is_no_adapter_is_named(base: Path, tmp_path: Path) -> None:
    config = EngineConfig(model=str(base), adapter=str(base), device="cpu")
    with pytest.raises(FileNotFoundError, match="adapter must be the folder of a PEFT adapter, got"):
        config.info()
    with pytest.raises(FileNotFoundError, match=r"adapter must be an existing folder.*got '\./none'"):
        EngineConfig(model=str(base), adapter="./none", device="cpu").info()
    with pytest.raises(ValueError, match="adapter must be a hub name or a folder"):
        EngineConfig(adapter="")
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json must be a JSON file"):
        AdapterConfig.read(tmp_path)
    lost = write_adapter(tmp_path / "lost", base_model_name_or_path="/train/base")
    with pytest.raises(FileNotFoundError, match=r"base_model_name_or_path in .*got '/train/base'"):
        EngineConfig(model=str(lost), device="cpu").info()
    unnamed = write_adapter(tmp_path / "unnamed")
    with pytest.raises(ValueError, match="must name a base_model_name_or_path, got None; set --model"):
        EngineConfig(model=str(unnamed), device="cpu").info()
    (unnamed / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold adapter_model\.safetensors or"):
        query_weight(str(base), str(unnamed))
