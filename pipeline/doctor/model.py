"""Checks of the hub and of a checkpoint: whether it can be reached, and fits into memory."""

from __future__ import annotations

import json
import math
import os
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub import HfApi, constants, get_token, snapshot_download

import blip2_actor.demo
from blip2_actor import EngineConfig, free_bytes, resolve_device
from pipeline.doctor.machine import check_disk
from pipeline.finding import GIB, Finding, gib
from pipeline.storage.folder import Folder, OpenFile

ENOUGH_CACHE_BYTES = 20 * GIB
"""The smallest checkpoint of the paper takes 15 GiB in float32."""
TIMEOUT_S = 5.0
DEMO = Path(blip2_actor.demo.__file__).parent / "checkpoint"
ACTIVATIONS = 1.25
"""Memory for weights, activations and a small KV cache over memory for weights."""
BYTES_PER_STORED_PARAMETER = 4
"""Of checkpoints without safetensors, which are stored in float32."""


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
        found = f"{constants.ENDPOINT} does not answer: {error}"
        return Finding("hub", "fail" if is_needed else "warn", found, remedy)
    return Finding("hub", "ok", f"{constants.ENDPOINT} answers, {token}")


def check_cache_disk() -> Finding:
    return check_disk("model cache", Path(constants.HF_HUB_CACHE), ENOUGH_CACHE_BYTES)


def is_on_hub(model: str) -> bool:
    """Return whether a model is a name on the hub."""
    return model != "demo" and "://" not in model and not Path(model).expanduser().exists()


def check_model(model: str, revision: str | None) -> Finding:
    """Check that a checkpoint can be read, and compare its size with the free memory of the device."""
    try:
        info = EngineConfig(model=model, revision=revision).info()
        num_parameters = count_parameters(model, revision)
    except (ValueError, OSError) as error:
        return Finding("model", "fail", str(error), "give another --model, or restore it")
    if not num_parameters:
        return Finding("model", "fail", f"{model} holds no weights", "give a folder with safetensors files")
    device = resolve_device("auto")
    needed = num_parameters * getattr(torch, info.dtype).itemsize * ACTIVATIONS
    free = free_bytes(device)
    found = (
        f"{model}, {num_parameters / 1e9:.2f} billion parameters in {info.dtype}: needs about {gib(needed)}, "
        f"{gib(free)} free on {device}"
    )
    if needed > free:
        remedy = "add --device-map auto, or free memory"
        return Finding("model", "warn", f"{found}: needs --device-map", remedy)
    return Finding("model", "ok", f"{found}: fits")


def count_parameters(model: str, revision: str | None) -> int:
    """Count the parameters of a checkpoint without reading its weights.

    Raises:
        OSError: it cannot be read.
    """
    if is_on_hub(model):
        return _count_on_hub(model, revision)
    return _count_in_folder(str(DEMO) if model == "demo" else model)


def _count_in_folder(uri: str) -> int:
    folder = Folder(uri)
    names = [name for name in folder.names() if "/" not in name]
    tensors = [name for name in names if name.endswith(".safetensors")]
    if tensors:
        return sum(folder.read(name, _count_in_header) for name in tensors)
    pickles = [name for name in names if name.startswith("pytorch_model") and name.endswith(".bin")]
    return sum(folder.read(name, lambda file: file.seek(0, os.SEEK_END)) for name in pickles) // (
        BYTES_PER_STORED_PARAMETER
    )


def _count_in_header(file: OpenFile) -> int:
    """Count the parameters that the header of a safetensors file lists."""
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _count_on_hub(model: str, revision: str | None) -> int:
    """Count the parameters of a model in the cache, or else by what the hub says of it."""
    with suppress(OSError):
        if cached := _count_in_folder(snapshot_download(model, revision=revision, local_files_only=True)):
            return cached
    try:
        found = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
    except Exception as error:  # The client also raises the errors of its HTTP library.
        raise OSError(f"the hub does not tell the size of {model}: {error}") from error
    if found.safetensors is not None:
        return found.safetensors.total
    sizes = (file.size or 0 for file in found.siblings or () if file.rfilename.startswith("pytorch_model"))
    return sum(sizes) // BYTES_PER_STORED_PARAMETER
