"""A checkpoint of LAVIS, the authors' own program, over the checkpoint that it was trained from.

LAVIS stores only the tensors that were trained, under names of its own, in one file together with the state
of the optimizer. The frozen ones, such as those of the language model, are those of the other checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from blip2_actor.checkpoints.weights.pytorch_file import MappedTensor, list_pytorch_tensors
from blip2_actor.checkpoints.weights.stored_tensor import StoredTensor, read_whole

SUFFIX = ".pth"
"""Ending of the file name."""
_BLOCK = r"visual_encoder\.blocks\.(\d+)\."
_LAYER = r"vision_model.encoder.layers.\1."
_NAMES = [
    (r"visual_encoder\.cls_token", "vision_model.embeddings.class_embedding"),
    (r"visual_encoder\.pos_embed", "vision_model.embeddings.position_embedding"),
    (r"visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (_BLOCK + r"norm([12])\.", _LAYER + r"layer_norm\2."),
    (_BLOCK + r"attn\.proj\.", _LAYER + "self_attn.projection."),
    (_BLOCK + r"attn\.", _LAYER + "self_attn."),
    (_BLOCK + r"mlp\.", _LAYER + "mlp."),
    (r"ln_vision\.", "vision_model.post_layernorm."),
    (r"Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (r"Qformer\.bert\.embeddings\.", "embeddings."),
    (r"Qformer\.bert\.(.+)\.self\.", r"qformer.\1.attention."),
    (r"Qformer\.bert\.", "qformer."),
    (r"(?:opt|t5)_proj\.", "language_projection."),
    (r"(?:opt|t5)_model\.", "language_model."),
    (r"(vision|text)_proj\.", r"\1_projection."),
]
"""How the names of LAVIS begin, and those of transformers; the first one that matches counts."""
_UNUSED = re.compile(r"temp|Qformer\.cls\..+|.+\.position_ids")
"""Tensors that only training uses, and numbers in order."""


def overlay_lavis(tensors: Mapping[str, StoredTensor], path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a model after its training with LAVIS.

    Args:
        tensors: those of the checkpoint that the training began with, by their names in transformers.
        path: the file.

    Raises:
        ValueError: the file holds something else, or the checkpoint of another model.
        OSError: the file is incomplete, or not of this format.
    """
    trained: dict[str, StoredTensor] = {}
    for name, stored in list_pytorch_tensors(path, entry="model").items():
        if not _UNUSED.fullmatch(name):
            trained[_renamed(name)] = stored
    _join_biases(trained)
    if not trained:
        raise ValueError(f"{path} must hold the tensors that LAVIS has trained, got none; name another file")
    advice = (
        "set --model to the checkpoint that LAVIS began with: the same task, language model and image size"
    )
    if unknown := sorted(trained.keys() - tensors.keys()):
        raise ValueError(
            f"{path} must be a checkpoint of LAVIS for this model, but holds {len(unknown)} tensors that the "
            f"model does not have, such as {unknown[0]}; {advice}"
        )
    for name, stored in trained.items():
        if stored.shape != tensors[name].shape:
            raise ValueError(
                f"{path} must be a checkpoint of LAVIS for this model, but {name} has the shape "
                f"{list(stored.shape)}, and {list(tensors[name].shape)} in the model; {advice}"
            )
    return {**tensors, **trained}


def _renamed(name: str) -> str:
    """Return the name of transformers, or the same one if LAVIS has no such name."""
    for pattern, replacement in _NAMES:
        renamed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return renamed
    return name


def _join_biases(trained: dict[str, StoredTensor]) -> None:
    """Make one bias of those of queries and values, with zeros for the keys, as transformers stores it."""
    for attention in [name.removesuffix("q_bias") for name in trained if name.endswith(".self_attn.q_bias")]:
        if f"{attention}v_bias" not in trained:
            continue  # the model has no tensor of this name, and the file is refused
        query, value = (read_whole(trained.pop(f"{attention}{part}_bias")) for part in "qv")
        joined = torch.cat([query, torch.zeros_like(query), value])
        trained[f"{attention}qkv.bias"] = MappedTensor(joined)
