"""Checks of the hub and of a checkpoint: whether it can be reached, and fits into memory."""

from __future__ import annotations

import json
import math
import os
import re
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, get_token, snapshot_download

import blip2_actor.demo
from blip2_actor import EngineConfig, free_bytes, resolve_device
from pipeline.doctor.machine import check_disk
from pipeline.finding import GIB, Finding, gib
from pipeline.run.hub_commit import is_on_hub
from pipeline.storage.folder import Folder, OpenFile

ENOUGH_CACHE_BYTES = 20 * GIB
"""The smallest checkpoint of the paper takes 15 GiB in float32."""
TIMEOUT_S = 5.0
DEMO = Path(blip2_actor.demo.__file__).parent / "checkpoint"
ACTIVATIONS = 1.25
"""Memory for weights, activations and a small KV cache over memory for weights."""
ENCODER_PARAMETERS = 1_100_000_000
"""Of the vision encoder and the Q-Former of published checkpoints, which int8-weights leaves as they are."""
WEIGHTS = re.compile(r"(model|pytorch_model)[^/]*\.(safetensors|bin)")
BYTES_PER_STORED_PARAMETER = 4
"""Of checkpoints without safetensors, which are stored in float32."""
INDEX = ".index.json"
WEIGHT_FILES = (
    *("model.safetensors", f"model.safetensors{INDEX}"),
    *("pytorch_model.bin", f"pytorch_model.bin{INDEX}"),
)
"""Files that hold the weights, or name those that do; an engine reads the first that is there."""
ADAPTER = "adapter_config.json"
POINTER = b"version https://git-lfs"
"""How a file begins that git has cloned without its content."""


class SizeUnknown(Exception):
    """The hub does not tell how large a checkpoint is."""


def check_hub(is_needed: bool) -> Finding:
    """Check that the hub answers.

    Args:
        is_needed: whether the run fetches its model from there.
    """
    token = "with a token" if get_token() else "without a token"
    if constants.HF_HUB_OFFLINE:
        return Finding("hub", "ok", f"offline by HF_HUB_OFFLINE, {token}; only models in the cache are used")
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):
            pass
    except urllib.error.HTTPError:
        pass  # It answers.
    except (OSError, ValueError) as error:
        remedy = (
            "check the network and HF_ENDPOINT, or give --model a folder; HF_HUB_OFFLINE=1 uses the cache"
        )
        reason = getattr(error, "reason", error)  # what urllib wraps
        reason = getattr(reason, "strerror", None) or reason
        found = f"{constants.ENDPOINT} does not answer: {reason}"
        return Finding("hub", "fail" if is_needed else "warn", found, remedy)
    return Finding("hub", "ok", f"{constants.ENDPOINT} answers, {token}")


def check_cache_disk(is_needed: bool) -> Finding:
    """Check the folder into which a model of the hub is downloaded; one that is there may hold the model.

    Args:
        is_needed: whether the run fetches its model from there.
    """
    cache = constants.HF_HUB_CACHE
    finding = check_disk("model cache", Path(cache), ENOUGH_CACHE_BYTES, "HF_HUB_CACHE")
    if finding.verdict == "fail" and (constants.HF_HUB_OFFLINE or not is_needed or os.path.isdir(cache)):
        return replace(finding, verdict="warn")
    return finding


def check_model(model: str, revision: str | None) -> Finding:
    """Check that a checkpoint is whole, and compare its size with the free memory of the device."""
    try:
        info = EngineConfig(model=model, revision=revision).info()
        num_parameters = count_parameters(model, revision)
    except SizeUnknown as error:
        remedy = "compare its size in docs/checkpoints.md with the free memory"
        return Finding("model", "warn", f"{model} can be read, its size is unknown: {error}", remedy)
    except (ValueError, OSError) as error:
        found, _, remedy = str(error).rpartition("; ")
        return Finding("model", "fail", found or str(error), remedy if found else "give another --model")
    if not num_parameters:
        return Finding("model", "fail", f"{model} holds no weights", "give a folder with safetensors files")
    device = resolve_device("auto")
    item_bytes = getattr(torch, info.dtype).itemsize
    needed, free = num_parameters * item_bytes * ACTIVATIONS, free_bytes(device)
    found = (
        f"{model}, {_size(num_parameters)} parameters in {info.dtype}: needs about {gib(needed)}, "
        f"{gib(free)} free on {device}"
    )
    if needed <= free:
        return Finding("model", "ok", f"{found}: fits")
    encoder = min(num_parameters, ENCODER_PARAMETERS)
    quantized = (encoder * item_bytes + num_parameters - encoder) * ACTIVATIONS
    if quantized <= free:
        remedy = (
            f"add --quantize int8-weights, which needs about {gib(quantized)} and changes some captions, or "
            "--device-map auto, which is slower; or free memory"
        )
        return Finding("model", "warn", f"{found}: needs --quantize or --device-map", remedy)
    remedy = "add --device-map auto, which is slower, or free memory; or choose a smaller checkpoint"
    return Finding("model", "warn", f"{found}: needs --device-map", remedy)


def _size(num_parameters: int) -> str:
    return f"{num_parameters / 1e9:.2f} billion" if num_parameters >= 1e8 else f"{num_parameters:,}"


def count_parameters(model: str, revision: str | None) -> int:
    """Count the parameters of a checkpoint without reading its weights.

    Returns:
        0 if it has no weights.

    Raises:
        SizeUnknown: the hub does not tell.
        OSError: a file of weights is missing or incomplete; or it is not here, and the hub may not be asked.
    """
    if is_on_hub(model):
        return _count_on_hub(model, revision)
    return _count_in_folder(str(DEMO) if model == "demo" else model)


def _count_in_folder(uri: str) -> int:
    folder = Folder(uri)
    names = {name for name in folder.names() if "/" not in name}
    first = next((name for name in WEIGHT_FILES if name in names), None)
    if first is None and ADAPTER in names:
        return count_parameters(str(_json_of(folder, ADAPTER, "base_model_name_or_path")), None)
    files = {first} if first else set()
    if first and first.endswith(INDEX):
        files = set(_json_of(folder, first, "weight_map").values())
    if files - names:
        lacking = ", ".join(sorted(files - names))
        raise OSError(f"{folder} lacks {lacking}, which {first} names; fetch the checkpoint again")
    return sum(folder.read(name, partial(_count_in_file, name)) for name in files)


def _json_of(folder: Folder, name: str, key: str) -> Any:
    """Return the value of a key in a JSON file.

    Raises:
        OSError: there is none.
    """
    try:
        return json.loads(folder.get(name) or b"{}")[key]
    except (ValueError, TypeError, KeyError) as error:
        raise OSError(f"{name} in {folder} is damaged: {error!r}; fetch the checkpoint again") from None


def _count_in_file(name: str, file: OpenFile) -> int:
    """Count the parameters that the header of a safetensors file lists, or those that fit into another file.

    Raises:
        OSError: the file is incomplete, or is not there but for its name.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(len(POINTER))
    if start == POINTER:
        raise OSError("it is a pointer of Git LFS; run git lfs pull in its folder")
    if name.endswith(".bin"):
        return size // BYTES_PER_STORED_PARAMETER
    header_bytes = 8 + int.from_bytes(start[:8], "little")
    file.seek(8)
    header = json.loads(file.read(header_bytes - 8)) if 8 < header_bytes <= size else {}
    tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
    if not tensors or header_bytes + max(tensor["data_offsets"][1] for tensor in tensors) > size:
        raise OSError("it is not a complete safetensors file; fetch it again")
    return sum(math.prod(tensor["shape"]) for tensor in tensors)


def _count_on_hub(model: str, revision: str | None) -> int:
    """Count the parameters of a model in the cache, or else by what the hub says of it."""
    with suppress(OSError):
        if cached := _count_in_folder(snapshot_download(model, revision=revision, local_files_only=True)):
            return cached
    if constants.HF_HUB_OFFLINE:
        raise FileNotFoundError(
            f"the weights of {model} are not in the cache, and HF_HUB_OFFLINE is set; unset it, or download "
            "the model before"
        )
    try:
        found = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
        if found.safetensors is not None:
            return found.safetensors.total
        files = {file.rfilename: file.size for file in found.siblings or ()}
        weights = {name: size for name, size in files.items() if WEIGHTS.fullmatch(name)}
        if any(name.endswith(".safetensors") for name in weights):
            return sum(HfApi().get_safetensors_metadata(model, revision=revision).parameter_count.values())
    except Exception as error:  # The client also raises the errors of its HTTP library.
        raise SizeUnknown(f"the hub does not tell it ({error})") from error
    if not files or None in weights.values():
        raise SizeUnknown("the hub does not tell the sizes of its files")
    return sum(size or 0 for size in weights.values()) // BYTES_PER_STORED_PARAMETER
