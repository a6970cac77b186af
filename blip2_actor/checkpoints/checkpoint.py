"""Finding a checkpoint by its hub name, folder, bucket or "demo", and describing it.

The result is always a local folder of files. This module reads only JSON; `weights.py` reads the tensors.
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

from transformers import Blip2Config, PreTrainedConfig

from blip2_actor.checkpoints.download import (
    CACHE_FOLDER,
    DESCRIPTION,
    FILES,
    fetch_from_bucket,
    fetch_from_hub,
    matches,
    write_whole,
)
from blip2_actor.checkpoints.generation_config import read_generation_config
from blip2_actor.checkpoints.image_processor import ImageProcessor
from blip2_actor.device import resolve_device, resolve_dtype
from blip2_actor.request import ModelInfo

DEMO_FOLDER = Path(__file__).parents[1] / "demo" / "checkpoint"
GENERATION_CONFIG = "generation_config.json"
RETRIEVAL = "Blip2ForImageTextRetrieval"
"""Architecture of the checkpoints without a language model, such as blip2-itm-vit-g."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are on this machine."""

    folder: Path
    version: str | None = None
    """Identifies the content at its source: the hub's commit, or a digest of the bucket's listing."""

    @cached_property
    def config(self) -> Blip2Config:
        """Configuration of a BLIP-2 with a language model.

        Raises:
            ValueError: the folder holds something else.
        """
        config = self._blip2_config()
        if RETRIEVAL in (config.architectures or []):
            raise ValueError(
                f"the model must have a language model, got {RETRIEVAL} in {self.folder}; "
                "use MatchingConfig to score images and texts with it, or name another model for captions"
            )
        text = config.text_config
        if text.model_type not in ("opt", "t5"):
            raise ValueError(
                f"the language model must be opt or t5, got {text.model_type!r} in {self.folder}"
            )
        if text.model_type == "opt" and text.word_embed_proj_dim != text.hidden_size:
            # The projected queries take the place of word embeddings; with unequal widths the reference
            # mixes up rows.
            raise ValueError(
                f"word_embed_proj_dim must equal hidden_size ({text.hidden_size}) in a BLIP-2 checkpoint, "
                f"got {text.word_embed_proj_dim}"
            )
        _fill_token_ids(text, self.folder)
        return config

    @cached_property
    def retrieval_config(self) -> Blip2Config:
        """Configuration of a BLIP-2 for image-text retrieval.

        Raises:
            ValueError: the folder holds something else.
        """
        config = self._blip2_config()
        if RETRIEVAL not in (config.architectures or []):
            raise ValueError(
                f"the model must be a {RETRIEVAL}, got {config.architectures} in {self.folder}; "
                "use EngineConfig for a model that writes text"
            )
        return config

    def _blip2_config(self) -> Blip2Config:
        raw = self._json("config.json")
        if raw is None:
            raise ValueError(f"{self.folder} has no config.json; name the folder of a checkpoint")
        if raw.get("model_type") != "blip-2":
            raise ValueError(
                f"the model must be BLIP-2, got model_type {raw.get('model_type')!r} in {self.folder}"
            )
        return Blip2Config.from_dict(raw)

    @cached_property
    def image_processor(self) -> ImageProcessor:
        """What the checkpoint's processor does to pixels.

        Raises:
            ValueError: it does something that is not supported.
        """
        for name in ("processor_config.json", "preprocessor_config.json"):
            stored = self._json(name) or {}
            if name == "processor_config.json":
                stored = stored.get("image_processor") or {}
            if stored:
                return ImageProcessor.of(stored, self.folder / name)
        return ImageProcessor.of({}, self.folder)

    def generation_config(self, ignore: bool) -> dict[str, Any]:
        """Return the options of `generation_config.json` that are not the defaults; none to ignore the file.

        Raises:
            ValueError: the file has an option that is not supported.
        """
        stored = None if ignore else self._json(GENERATION_CONFIG)
        if stored is None:
            return {}
        return read_generation_config(stored, self.config.text_config, self.folder / GENERATION_CONFIG)

    def require_image_size(self, config: Blip2Config, asked_px: int | None = None) -> int:
        """Return the side of the square that the vision encoder takes, in pixels.

        Args:
            config: of this checkpoint.
            asked_px: size for which its positions are interpolated; None takes the checkpoint's own.

        Raises:
            ValueError: the asked size does not consist of whole patches, or no size is asked and the image
                processor makes another one than the checkpoint's.
        """
        if asked_px is not None:
            patch_px = config.vision_config.patch_size
            if asked_px % patch_px:
                raise ValueError(
                    f"image_size_px must be a multiple of the patch size of {self.folder}, {patch_px}, got "
                    f"{asked_px}; the nearest is {max(round(asked_px / patch_px), 1) * patch_px}"
                )
            return asked_px
        size_px: int = config.vision_config.image_size
        processor_px = self.image_processor.size_px
        if processor_px not in (None, size_px):
            raise ValueError(
                f"size of the image processor in {self.folder} must be the image_size of the vision encoder, "
                f"{size_px}, got {processor_px}; set image_size_px to the size that you want"
            )
        return size_px

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        return json.loads(path.read_text()) if path.exists() else None

    def digest(self) -> str:
        """Return what identifies the content: the version, or a hash of all files.

        The hash is cached by the files' sizes and modification times.
        """
        if self.version is not None:
            return self.version
        if self.folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", self.folder.name):
            return self.folder.name  # a folder in the hub's own cache
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


def _fill_token_ids(text: PreTrainedConfig, folder: Path) -> None:
    """Set the special tokens that a configuration of the language model leaves out, as transformers does.

    A T5 starts its answers with `decoder_start_token_id`, or else with `bos_token_id`.

    Raises:
        ValueError: a T5 has neither.
    """
    text.bos_token_id = getattr(text, "bos_token_id", None)
    if text.model_type == "t5":
        start = getattr(text, "decoder_start_token_id", None)
        text.decoder_start_token_id = text.bos_token_id if start is None else start
        if text.decoder_start_token_id is None:
            raise ValueError(
                f"text_config in {folder}/config.json must have decoder_start_token_id or bos_token_id, got "
                "neither; T5 models usually start with their pad token, 0"
            )
    if text.pad_token_id is None:
        eos = text.eos_token_id
        text.pad_token_id = eos[0] if isinstance(eos, list) else eos


def resolve(model: str, revision: str | None = None, with_weights: bool = True) -> Checkpoint:
    """Find a checkpoint; a remote one is fetched once per machine.

    Args:
        model: as in `ModelConfig.model`.
        revision: commit, tag or branch of a hub model.
        with_weights: False does not fetch remote weights, which describing the model does not need.

    Raises:
        OSError: the checkpoint cannot be found or fetched.
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
            'model must be an existing folder, a hub name such as "Salesforce/blip2-opt-2.7b", an s3:// or '
            f'gs:// folder, or "demo", got {model!r}'
        )
    return Checkpoint(*fetch_from_hub(model, revision, patterns))


def describe(
    model: str,
    revision: str | None,
    device: str,
    dtype: str,
    read: Callable[[Checkpoint], Blip2Config],
    ignore_generation_config: bool = True,
    image_size_px: int | None = None,
) -> ModelInfo:
    """Describe a model without loading weights (see `EngineConfig.info`).

    Args:
        model: as in `resolve`.
        revision: as in `resolve`.
        device: as in `ModelConfig.device`.
        dtype: as in `ModelConfig.dtype`.
        read: returns the configuration of the checkpoint, and refuses those of another kind.
        ignore_generation_config, image_size_px: as in `EngineConfig`.

    Raises:
        ValueError: the checkpoint is of another kind, or this machine has no such device or dtype.
        OSError: the checkpoint cannot be found or fetched.
    """
    checkpoint = resolve(model, revision, with_weights=False)
    resolved_dtype = resolve_dtype(dtype, resolve_device(device))
    config = read(checkpoint)
    return ModelInfo(
        model=model,
        image_size_px=checkpoint.require_image_size(config, image_size_px),
        dtype=str(resolved_dtype).removeprefix("torch."),
        digest=checkpoint.digest(),
        vision_width=config.vision_config.hidden_size,
        qformer_width=config.qformer_config.hidden_size,
        num_queries=config.num_query_tokens,
        generation_config=checkpoint.generation_config(ignore_generation_config),
    )
