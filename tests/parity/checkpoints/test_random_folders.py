"""Folders with random files: the engine loads what transformers loads, equally, or refuses it.

Every weight file in a folder has different weights, so the loss tells which files were read.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Blip2ForConditionalGeneration

from blip2_actor.checkpoints.checkpoint import resolve
from blip2_actor.checkpoints.loading import load_model
from blip2_actor.testing import IMAGE_SIZE_PX, IMAGE_TOKEN_ID, NUM_QUERIES

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PIXELS = torch.randn(1, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX, generator=torch.Generator().manual_seed(5))
INPUT_IDS = torch.tensor([[7, 8, 9]])
NUM_FOLDERS = 10
"""150 of the folders agreed when this test was written."""
KINDS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def write_weights(
    folder: Path, kind: str, tensors: dict[str, Tensor], chance: random.Random, has_prefix: bool
) -> None:
    """Write one kind of weight file; a third have a prefix or another dtype, or lack a tensor or a shard."""
    change = chance.choice(("prefix", "drop", "half", "lost", *["whole"] * 8))
    prefix = chance.choice(("module.", "_orig_mod.", "model.", "blip."))
    if change == "prefix" and has_prefix:
        tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    elif change == "drop":
        tensors.pop(chance.choice(sorted(tensors)))
    elif change == "half":
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    files = {kind: tensors}
    if kind.endswith(".index.json"):
        stem, suffix = kind.removesuffix(".index.json").split(".")
        names = [f"{stem}-{i:05}-of-00003.{suffix}" for i in (1, 2, 3)]
        weight_map = {name: chance.choice(names) for name in tensors}
        (folder / kind).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        files = {n: {t: tensors[t] for t, file in weight_map.items() if file == n} for n in names}
        if change == "lost":
            files.pop(names[0])
    for name, part in files.items():
        if name.endswith(".bin"):
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name, metadata={"format": "pt"})


def write_adapter(folder: Path, tensors: dict[str, Tensor], chance: random.Random) -> None:
    """Write an adapter of one layer, as PEFT writes it."""
    name = chance.choice(
        [n for n in tensors if n.endswith((".qkv.weight", ".query.weight", ".v_proj.weight"))]
    )
    module, rows, columns = name.removesuffix(".weight"), *tensors[name].shape
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": [module]}
    config |= chance.choice(({}, {"use_rslora": True}, {"alpha_pattern": {module.rpartition(".")[2]: 3}}))
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    matrices = {"lora_A": torch.randn(2, columns), "lora_B": torch.randn(rows, 2)}
    stored = {f"base_model.model.{module}.{key}.weight": matrix for key, matrix in matrices.items()}
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def write_folder(folder: Path, base: Path, seed: int, has_prefix: bool) -> Path:
    """Write the folder for a seed: some kinds of weights and, in four of ten, an adapter."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    original = load_file(base / "model.safetensors")
    for kind in chance.sample(KINDS, chance.choice((1, 2, 3))):
        tensors = {name: tensor.clone() for name, tensor in original.items()}
        tensors["language_projection.weight"] += torch.randn(32, 16)
        write_weights(folder, kind, tensors, chance, has_prefix)
    if chance.random() < 0.4:
        write_adapter(folder if has_prefix else folder / "adapter", original, chance)
    return folder


@torch.no_grad()
def expected_loss(folder: Path) -> Tensor | None:
    """Return transformers' loss, or None if it refuses the folder or fills tensors with random numbers."""
    try:
        model, info = Blip2ForConditionalGeneration.from_pretrained(
            folder, output_loading_info=True, dtype=torch.float32
        )
    except (OSError, KeyError, RuntimeError):
        return None
    if info["missing_keys"] or info["mismatched_keys"]:
        return None
    if (folder / "adapter").exists():
        model.load_adapter(str(folder / "adapter"))
    input_ids = torch.cat([torch.full((1, NUM_QUERIES), IMAGE_TOKEN_ID), INPUT_IDS], dim=1)
    labels = torch.cat([torch.full((1, NUM_QUERIES), -100), INPUT_IDS], dim=1)
    return model.eval()(PIXELS, input_ids=input_ids, labels=labels).loss


@torch.no_grad()
def our_loss(folder: Path) -> Tensor | None:
    try:
        model = load_model(resolve(str(folder)), torch.device("cpu"), torch.float32)
    except (OSError, ValueError):
        return None
    return model(PIXELS, INPUT_IDS, INPUT_IDS)[0]


def test_folders_give_the_losses_of_transformers(
    checkpoint_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers gets the folder without the prefix of a wrapper, which it does not know.

    It gets the adapter separately, because it does not report random tensors of a model with an adapter.
    """
    base = checkpoint_folder("opt")
    losses = set()
    for seed in range(NUM_FOLDERS):
        ours = our_loss(write_folder(tmp_path / f"{seed}", base, seed, has_prefix=True))
        expected = expected_loss(write_folder(tmp_path / f"{seed} plain", base, seed, has_prefix=False))
        assert (ours is None) == (expected is None), (
            f"seed {seed}: {sorted((tmp_path / f'{seed}').iterdir())}"
        )
        if expected is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5, msg=f"seed {seed}")
            losses.add(round(float(expected), 4))
    assert len(losses) >= NUM_FOLDERS // 2, "most folders must be answered, or nothing is compared"
