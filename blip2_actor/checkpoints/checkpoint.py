"""Where a checkpoint is and what it is: hub name, folder, bucket or "demo" to a local folder of files.

Reads JSON only; `weights.py` reads the tensors.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import Blip2Config

from blip2_actor.checkpoints.download import (
    CACHE_FOLDER,
    DESCRIPTION,
    FILES,
    fetch_from_bucket,
    fetch_from_hub,
    matches,
    write_whole,
)
from blip2_actor.device import resolve_device, resolve_dtype
from blip2_actor.request import ModelInfo

DEMO_FOLDER = Path(__file__).parents[1] / "demo" / "checkpoint"
RETRIEVAL = "Blip2ForImageTextRetrieval"
"""The architecture of checkpoints without a language model, such as blip2-itm-vit-g."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's files on this machine."""

    folder: Path
    version: str | None = None
    """What names the content where it came from: the hub's commit, a digest of the bucket's listing."""

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
        """Identifies the content: its version, or a hash of every file, cached by size and time."""
        if self.version is not None:
            return self.version
        if self.folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", self.folder.name):
            return self.folder.name  # the hub's own cache, named as a folder
        files = sorted(path for path in self.folder.iterdir() if matches(path.name, FILES))
        stamp = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        key = hashlib.sha256(json.dumps([str(self.folder.resolve()), stamp]).encode()).hexdigest()
        cached = CACHE_FOLDER / "digests" / key
        if cached.exists():
            return cached.read_text()
        total = hashlib.blake2b(digest_size=16)
        for path in files:
            with path.open("rb") as file:
                total.update(path.name.encode() + hashlib.file_digest(file, "blake2b").digest())
        write_whole(cached, total.hexdigest())
        return total.hexdigest()


def resolve(model: str, revision: str | None = None, with_weights: bool = True) -> Checkpoint:
    """Find a checkpoint, fetching it once per machine where it is remote.

    Args:
        model: as in `ModelConfig.model`.
        revision: of a hub model.
        with_weights: False leaves remote weights where they are: enough to describe it.

    Raises:
        OSError: it cannot be found or fetched.
    """
    if model == "demo":
        return Checkpoint(DEMO_FOLDER)
    patterns = FILES if with_weights else DESCRIPTION
    if "://" in model:
        return Checkpoint(*fetch_from_bucket(model, patterns))
    if Path(model).is_dir():
        return Checkpoint(Path(model))
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise FileNotFoundError(
            f'model must be a folder that exists, a hub name such as "Salesforce/blip2-opt-2.7b", '
            f'an s3:// or gs:// folder, or "demo", got {model!r}'
        )
    return Checkpoint(*fetch_from_hub(model, revision, patterns))


def describe(
    model: str, revision: str | None, device: str, dtype: str, read: Callable[[Checkpoint], Blip2Config]
) -> ModelInfo:
    """See `EngineConfig.info`; `read` says which of the checkpoint's configurations is wanted."""
    checkpoint = resolve(model, revision, with_weights=False)
    resolved = resolve_dtype(dtype, resolve_device(device))
    found = read(checkpoint)
    return ModelInfo(
        model=model,
        image_size_px=found.vision_config.image_size,
        dtype=str(resolved).removeprefix("torch."),
        digest=checkpoint.digest(),
        vision_width=found.vision_config.hidden_size,
        qformer_width=found.qformer_config.hidden_size,
        num_queries=found.num_query_tokens,
    )
