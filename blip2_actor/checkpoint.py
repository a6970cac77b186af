"""Where a checkpoint is and what it is: hub name, folder, bucket or "demo" to a local folder of files.

Reads JSON only; `weights.py` reads the tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import filelock
import fsspec
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import Blip2Config

from blip2_actor.config import ModelConfig
from blip2_actor.device import resolve_device, resolve_dtype
from blip2_actor.request import ModelInfo

DEMO_FOLDER = Path(__file__).parent / "demo" / "checkpoint"
FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
"""What is fetched of a hub repository or a bucket."""
RETRIEVAL = "Blip2ForImageTextRetrieval"
"""The architecture of checkpoints without a language model, such as blip2-itm-vit-g."""
CACHE_FOLDER = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "blip2"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's files on this machine."""

    folder: Path

    @cached_property
    def config(self) -> Blip2Config:
        """Raises ValueError where the folder holds something else than a BLIP-2 that writes text."""
        config = self._blip2_config()
        if RETRIEVAL in (config.architectures or []):
            raise ValueError(
                f"the model must have a language model, got {RETRIEVAL} in {self.folder}; "
                "build it with MatchingConfig, which scores images and texts, or name another for captions"
            )
        if config.text_config.model_type not in ("opt", "t5"):
            raise ValueError(
                f"language model must be opt or t5, got {config.text_config.model_type!r} in {self.folder}"
            )
        text = config.text_config
        if text.model_type == "opt" and text.word_embed_proj_dim != text.hidden_size:
            # The projected queries take the place of word embeddings; the reference mixes rows up here.
            raise ValueError(
                f"word_embed_proj_dim must equal hidden_size ({text.hidden_size}) in a BLIP-2 checkpoint, "
                f"got {text.word_embed_proj_dim}"
            )
        return config

    @cached_property
    def retrieval_config(self) -> Blip2Config:
        """Raises ValueError where the folder holds something else than a BLIP-2 for image-text retrieval."""
        config = self._blip2_config()
        if RETRIEVAL not in (config.architectures or []):
            raise ValueError(
                f"the model must be a {RETRIEVAL}, got {config.architectures} in {self.folder}; "
                "build one that writes text with EngineConfig"
            )
        return config

    def _blip2_config(self) -> Blip2Config:
        raw = self._json("config.json")
        if raw is None:
            raise ValueError(f"{self.folder} must hold a config.json, got none; name a checkpoint's folder")
        if raw.get("model_type") != "blip-2":
            raise ValueError(
                f"the model must be BLIP-2, got model_type {raw.get('model_type')!r} in {self.folder}"
            )
        return Blip2Config.from_dict(raw)

    @cached_property
    def image_processor(self) -> dict[str, Any]:
        """mean, std and rescale factor, from either file that transformers has stored them in."""
        raw = self._json("preprocessor_config.json") or (self._json("processor_config.json") or {}).get(
            "image_processor", {}
        )
        return {
            # The defaults are CLIP's, as in transformers' BlipImageProcessor.
            "mean": raw.get("image_mean", [0.48145466, 0.4578275, 0.40821073]),
            "std": raw.get("image_std", [0.26862954, 0.26130258, 0.27577711]),
            "rescale_factor": raw.get("rescale_factor", 1 / 255),
        }

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        return json.loads(path.read_text()) if path.exists() else None

    def digest(self) -> str:
        """Identifies the content: the hub's commit, or a hash of every file, cached by size and time."""
        parents = [p.name for p in self.folder.parents]
        if parents[:1] == ["snapshots"]:
            return self.folder.name
        files = sorted(p for p in self.folder.iterdir() if any(p.match(pattern) for pattern in FILES))
        stamp = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        key = hashlib.sha256(json.dumps([str(self.folder.resolve()), stamp]).encode()).hexdigest()
        cached = CACHE_FOLDER / "digests" / key
        if cached.exists():
            return cached.read_text()
        total = hashlib.blake2b(digest_size=16)
        for path in files:
            with path.open("rb") as file:
                total.update(path.name.encode() + hashlib.file_digest(file, "blake2b").digest())
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.write_text(total.hexdigest())
        return total.hexdigest()


def resolve(model: str, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint, fetching it once per machine where it is remote.

    Raises:
        OSError: it cannot be found or fetched.
    """
    if model == "demo":
        return Checkpoint(DEMO_FOLDER)
    if "://" in model:
        return Checkpoint(_fetch(model))
    if Path(model).is_dir():
        return Checkpoint(Path(model))
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise FileNotFoundError(
            f'model must be a folder that exists, a hub name such as "Salesforce/blip2-opt-2.7b", '
            f'an s3:// or gs:// folder, or "demo", got {model!r}'
        )
    return Checkpoint(_snapshot(model, revision))


def describe(config: ModelConfig, read: Callable[[Checkpoint], Blip2Config]) -> ModelInfo:
    """See `EngineConfig.info`; `read` says which of the checkpoint's configurations is wanted."""
    checkpoint = resolve(config.model, config.revision)
    dtype = resolve_dtype(config, resolve_device(config.device))
    found = read(checkpoint)
    return ModelInfo(
        model=config.model,
        image_size_px=found.vision_config.image_size,
        dtype=str(dtype).removeprefix("torch."),
        digest=checkpoint.digest(),
        vision_width=found.vision_config.hidden_size,
        qformer_width=found.qformer_config.hidden_size,
        num_queries=found.num_query_tokens,
    )


def _snapshot(model: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=FILES))
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"model must exist on the hub, got {model!r}; check its spelling or log in"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise OSError(
            f"{model!r} is not on this machine and the hub cannot be reached ({type(error).__name__}); "
            'give --model a folder, an s3:// or gs:// folder, or "demo", or run where the hub can be reached'
        ) from error


def _fetch(uri: str) -> Path:
    """Copy a bucket's folder to this machine's cache, once for all processes."""
    try:
        filesystem, root = fsspec.core.url_to_fs(uri)
        listed = {e["name"]: e for e in filesystem.ls(root, detail=True) if e["type"] == "file"}
    except ImportError as error:
        raise OSError(f"{uri} needs a package that is missing: {error}; install it") from error
    except Exception as error:  # every store's library has exceptions of its own
        raise OSError(f"{uri} must be a readable folder, got {type(error).__name__}: {error}") from error
    wanted = sorted(name for name in listed if any(Path(name).match(pattern) for pattern in FILES))
    if not wanted:
        raise FileNotFoundError(f"{uri} must hold a checkpoint's files, got none of {', '.join(FILES)}")
    stamp = [
        (n, listed[n]["size"], str(listed[n].get("ETag") or listed[n].get("etag") or "")) for n in wanted
    ]
    folder = CACHE_FOLDER / "checkpoints" / hashlib.sha256(json.dumps([uri, stamp]).encode()).hexdigest()[:24]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            partial.mkdir(exist_ok=True)
            for name in wanted:
                filesystem.get_file(name, str(partial / Path(name).name))
            partial.rename(folder)
    return folder
