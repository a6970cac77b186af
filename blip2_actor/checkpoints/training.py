"""A model to train, and a trained one back in a folder that transformers loads.

An engine holds its weights in the form that computes fastest, and never changes them. Here they are plain
parameters of a PyTorch module: `Blip2.forward` returns the loss of given texts, and `Blip2Retrieval` has
methods for the scores and embeddings of images and texts, all with gradients.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from blip2_actor.checkpoints.checkpoint import Checkpoint, resolve
from blip2_actor.checkpoints.download import DESCRIPTION, matches
from blip2_actor.checkpoints.json_file import read_json_object
from blip2_actor.checkpoints.loading import load_model, load_retrieval, rules_of, stored_tensors
from blip2_actor.checkpoints.weights.adapter_config import ADAPTER_CONFIG
from blip2_actor.checkpoints.weights.write_weights import tensors_to_write, write_safetensors
from blip2_actor.device import resolve_device, resolve_dtype
from blip2_actor.models.blip2 import Blip2
from blip2_actor.models.retrieval import Blip2Retrieval


def load_for_training(
    model: str | Path,
    *,
    revision: str | None = None,
    adapter: str | Path | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> Blip2:
    """Load a captioning model whose parameters have gradients.

    Args:
        model, revision, adapter, device, dtype: as in `EngineConfig`; an adapter is merged.

    Raises:
        ValueError: the checkpoint cannot be run; the message names the field.
        OSError: the checkpoint cannot be found or read.

    Examples:
        >>> model = load_for_training("demo")
        >>> loss, logits = model(pixel_values, input_ids)
        >>> loss.backward()
        >>> optimizer.step()
        >>> save_model(model, "trained", like="demo")
    """
    on = resolve_device(device)
    checkpoint = _resolve(model, revision, adapter)
    return load_model(checkpoint, on, resolve_dtype(dtype, on)).requires_grad_(True)


def load_retrieval_for_training(
    model: str | Path,
    *,
    revision: str | None = None,
    adapter: str | Path | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> Blip2Retrieval:
    """Load a model for image-text retrieval whose parameters have gradients.

    The arguments and the errors are those of `load_for_training`. Of the module, `image_features` reads
    normalized images, `matching_logits` and `contrastive_scores` score them with texts.

    Examples:
        >>> model = load_retrieval_for_training("Salesforce/blip2-itm-vit-g")
        >>> logits = model.matching_logits(model.image_features(pixel_values), texts)
        >>> torch.nn.functional.cross_entropy(logits, labels).backward()
    """
    on = resolve_device(device)
    checkpoint = _resolve(model, revision, adapter)
    return load_retrieval(checkpoint, on, resolve_dtype(dtype, on)).requires_grad_(True)


def save_model(
    model: Blip2 | Blip2Retrieval,
    folder: str | Path,
    like: str | Path,
    *,
    revision: str | None = None,
    adapter: str | Path | None = None,
) -> None:
    """Write a model to a new folder that transformers and `EngineConfig(model=folder)` load.

    The folder appears when it is complete. It holds the weights in safetensors under the names that they have
    in the checkpoint, its configuration, and its processor and tokenizer files.

    Args:
        model: from `load_for_training` or `load_retrieval_for_training`.
        folder: a folder that does not exist yet, or is empty.
        like: the checkpoint that the model was loaded from, as for `load_for_training`.
        revision: its revision, if one was named.
        adapter: its adapter, if one was named.

    Raises:
        ValueError: the model is not like this checkpoint; the message names the weight.
        FileExistsError: the folder holds something.
        OSError: the checkpoint cannot be read, or the folder cannot be written.
    """
    folder = Path(folder).absolute()
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"folder must be new or empty, got {folder}; name another, or delete it")
    checkpoint = _resolve(like, revision, adapter)
    tensors = tensors_to_write(model, stored_tensors(checkpoint), rules_of(checkpoint))
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        for path in checkpoint.folder.iterdir():
            if path.is_file() and matches(path.name, DESCRIPTION) and not _is_replaced(path.name):
                shutil.copyfile(path, partial / path.name)
        config = _config(model, checkpoint)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_safetensors(partial / "model.safetensors", tensors)
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _resolve(model: str | Path, revision: str | None, adapter: str | Path | None) -> Checkpoint:
    return resolve(str(model), revision, adapter=None if adapter is None else str(adapter))


def _is_replaced(name: str) -> bool:
    """Return whether a file describes the old weights."""
    return name in ("config.json", ADAPTER_CONFIG) or name.endswith(".index.json")


def _config(model: Blip2 | Blip2Retrieval, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the checkpoint's configuration with the dtype of the model, and whether its head is shared."""
    config = read_json_object(checkpoint.folder / "config.json") or {}
    dtype = str(model.dtype).removeprefix("torch.")
    if "dtype" not in config:
        config.setdefault("torch_dtype", dtype)  # as older versions write it, which newer ones read too
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        part |= {key: dtype for key in ("dtype", "torch_dtype") if part.get(key) is not None}
    if isinstance(model, Blip2) and not _shares_head(model):
        text = config["text_config"]
        for part in (config, text):
            part["tie_word_embeddings"] = False
        scales = getattr(model.config.text_config, "scale_decoder_outputs", None)
        if scales is not None:  # of a T5, which otherwise takes it from tie_word_embeddings
            text["scale_decoder_outputs"] = scales
    return config


def _shares_head(model: Blip2) -> bool:
    return model.language_model.lm_head.weight is model.language_model.embed_tokens.weight
