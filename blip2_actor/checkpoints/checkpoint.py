"""Finding a checkpoint by its hub name, folder, bucket or "demo", and describing it.

The result is always a local folder of files. This module reads only JSON; `weights/` reads the tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import Blip2Config

from blip2_actor.checkpoints.download import (
    cache_folder,
    fetch_from_bucket,
    fetch_from_hub,
    require_linked_files,
    select_files,
    write_cached,
)
from blip2_actor.checkpoints.generation_config import fill_special_tokens, read_generation_config
from blip2_actor.checkpoints.image_processor import ImageProcessor
from blip2_actor.checkpoints.json_file import read_json_object
from blip2_actor.checkpoints.model_config import read_model_config
from blip2_actor.checkpoints.vocabulary import require_vocabulary
from blip2_actor.checkpoints.weights.adapter_config import ADAPTER_CONFIG, AdapterConfig
from blip2_actor.checkpoints.weights.lavis import SUFFIX as LAVIS_SUFFIX
from blip2_actor.device import resolve_device, resolve_dtype
from blip2_actor.flags import split_uri
from blip2_actor.request import ModelInfo

DEMO_FOLDER = Path(__file__).parents[1] / "demo" / "checkpoint"
GENERATION_CONFIG = "generation_config.json"
DIGEST_THREADS = 4
"""Files that are hashed at once: one thread hashes a GB in a second, and shards have several GB."""
RETRIEVAL = "Blip2ForImageTextRetrieval"
"""Architecture of the checkpoints without a language model, such as blip2-itm-vit-g."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are on this machine."""

    folder: Path
    """With the files; of an adapter of LAVIS, the file itself."""
    version: str | None = None
    """Identifies the content at its source: the hub's commit, or a digest of the bucket's listing."""
    adapter: Checkpoint | None = None
    """The LoRA adapter that is merged into the weights, which may be in the same folder; or the checkpoint of
    LAVIS whose tensors take the place of some of them."""

    @property
    def is_lavis(self) -> bool:
        return self.folder.suffix == LAVIS_SUFFIX and not self.folder.is_dir()

    @cached_property
    def _any_config(self) -> Blip2Config:
        return read_model_config(self.folder)

    @cached_property
    def is_retrieval(self) -> bool:
        """Whether the model has no language model, and matches images with texts."""
        return RETRIEVAL in (self._any_config.architectures or [])

    @cached_property
    def config(self) -> Blip2Config:
        """Configuration of a BLIP-2 with a language model.

        Raises:
            ValueError: the folder holds something else, or no vocabulary for the model.
        """
        config = self._any_config
        if self.is_retrieval:
            raise ValueError(
                f"the model must have a language model, got {RETRIEVAL} in {self.folder}; "
                "give it as score_model (in Python: MatchingConfig) to score images and texts"
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
        fill_special_tokens(text, self.folder)
        ends = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
        special_ids = [i for i in (text.bos_token_id, *ends) if i is not None]
        require_vocabulary(self.folder, text.model_type, text.vocab_size, special_ids)
        return config

    @cached_property
    def retrieval_config(self) -> Blip2Config:
        """Configuration of a BLIP-2 for image-text retrieval.

        Raises:
            ValueError: the folder holds something else, or no vocabulary for the model.
        """
        config = self._any_config
        if not self.is_retrieval:
            raise ValueError(
                f"the model must be a {RETRIEVAL}, got {', '.join(config.architectures or ['none'])} in "
                f"{self.folder}; one that writes text is used without score_model (in Python: EngineConfig)"
            )
        require_vocabulary(self.folder, "bert", config.qformer_config.vocab_size, ())
        return config

    @cached_property
    def image_processor(self) -> ImageProcessor:
        """What the checkpoint's processor does to pixels.

        Raises:
            ValueError: it does something that is not supported.
        """
        path = self.folder / "processor_config.json"
        stored = (read_json_object(path) or {}).get("image_processor")
        if not stored:
            path = self.folder / "preprocessor_config.json"
            stored = read_json_object(path) or {}
        return ImageProcessor.of(stored, path)

    def generation_config(self, ignore: bool) -> dict[str, Any]:
        """Return the options of `generation_config.json` that are not the defaults; none to ignore the file.

        Raises:
            ValueError: the file has an option that is not supported.
        """
        path = self.folder / GENERATION_CONFIG
        stored = None if ignore else read_json_object(path)
        return {} if stored is None else read_generation_config(stored, self.config.text_config, path)

    def digest(self) -> str:
        """Return what identifies the content: the version, or a hash of all files.

        The hash is cached by the files' sizes and modification times. An adapter is part of the content.
        """
        if self.adapter is not None:
            return f"{dataclasses.replace(self, adapter=None).digest()}+{self.adapter.digest()}"
        if self.version is not None:
            return self.version
        if self.folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", self.folder.name):
            return self.folder.name  # a folder in the hub's own cache
        files = [self.folder]
        if not self.is_lavis:
            names = select_files(p.name for p in self.folder.iterdir() if p.is_file())
            files = [self.folder / name for name in names]
        stamp = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        key = hashlib.sha256(json.dumps([str(self.folder.resolve()), stamp]).encode()).hexdigest()
        cached = cache_folder() / "digests" / key
        with suppress(OSError):  # not computed yet, or out of this user's reach
            return cached.read_text()
        total = hashlib.blake2b(digest_size=16)
        with ThreadPoolExecutor(DIGEST_THREADS) as threads:
            for path, digest in zip(files, threads.map(_file_digest, files), strict=True):
                total.update(path.name.encode() + digest)
        write_cached(cached, total.hexdigest())
        return total.hexdigest()


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def resolve(
    model: str, revision: str | None = None, with_weights: bool = True, adapter: str | None = None
) -> Checkpoint:
    """Find a checkpoint and its adapter; remote ones are fetched once per machine.

    Args:
        model: as in `ModelConfig.model`. A folder with an adapter and no config.json is that of an adapter
            alone, which names its model.
        revision: commit, tag or branch of a hub model; refused for others, which have one version.
        with_weights: False does not fetch remote weights, which describing the model does not need.
        adapter: as in `EngineConfig.adapter`.

    Raises:
        OSError: the checkpoint or the adapter cannot be found or fetched.
        ValueError: there is more than one adapter, or it cannot be merged; or `revision` names nothing.
    """
    if revision is not None and (model == "demo" or "://" in model or Path(model).is_dir()):
        raise ValueError(
            f"the revision must be left out unless the model is one of the hub, got {revision!r} for "
            f"{model!r}, which has one version"
        )
    found = _find("the model", model, revision, with_weights)  # --model or --score-model
    if adapter is not None:
        return _adapted(found, _find("adapter", adapter, None, with_weights))
    path = found.folder / ADAPTER_CONFIG
    if not path.exists():
        return found
    config = AdapterConfig.read(found.folder)
    if (found.folder / "config.json").exists():
        return dataclasses.replace(found, adapter=found)
    where = f"base_model_name_or_path in {path} (or --model, with --adapter {found.folder})"
    return _adapted(_find(where, config.base_model, config.fields.get("revision"), with_weights), found)


def _adapted(base: Checkpoint, adapter: Checkpoint) -> Checkpoint:
    if not adapter.is_lavis:
        AdapterConfig.read(adapter.folder).require_model(base.folder)
    if (base.folder / ADAPTER_CONFIG).exists():
        raise ValueError(
            f"adapter must be left out for a model with an adapter in its folder, got {adapter.folder} and "
            f"{base.folder / ADAPTER_CONFIG}; name a model without an adapter"
        )
    return dataclasses.replace(base, adapter=adapter)


def _find(field: str, name: str, revision: str | None, with_weights: bool) -> Checkpoint:
    """Find one folder of files; `field` is what messages call the setting that names it."""
    is_lavis = field == "adapter" and name.endswith(LAVIS_SUFFIX)
    if name == "demo":
        return Checkpoint(DEMO_FOLDER)
    if "://" in name:
        require_no_secret(field, name)
        folder, version = fetch_from_bucket(name, with_weights)
        return Checkpoint(folder / Path(name).name if is_lavis else folder, version)
    if Path(name).is_dir():
        require_linked_files(Path(name))
        return Checkpoint(Path(name))
    if Path(name).is_file():
        if is_lavis:
            return Checkpoint(Path(name))
        raise NotADirectoryError(
            f"{field} must be a folder of files in the format of transformers, got the file {name}; name its "
            f"folder, or for a {LAVIS_SUFFIX} of LAVIS set --model to the checkpoint that it began with, and "
            "--adapter to the file"
        )
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise FileNotFoundError(
            f'{field} must be an existing folder, a hub name such as "Salesforce/blip2-opt-2.7b", an s3:// '
            f'or gs:// folder, or "demo", got {name!r}'
        )
    return Checkpoint(*fetch_from_hub(name, revision, with_weights))


def require_no_secret(field: str, uri: str) -> None:
    """Refuse a URI with a password, a token or a signature: what settings name is stored and shown."""
    parts = split_uri(field, uri)
    place, _, host = parts.netloc.rpartition("@")
    # Only to a web server a user name alone may be a token; in az:// it is a container.
    is_token = bool(place) and parts.scheme in ("http", "https")
    if parts.password is not None or is_token or parts.query:
        raise ValueError(
            f"{field} must hold no password and no option, because it is stored and shown, got one in "
            f"{parts.scheme}://{host}{parts.path}; give it to the store by environment variables, such as "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AZURE_STORAGE_SAS_TOKEN"
        )


def describe(
    model: str,
    revision: str | None,
    device: str,
    dtype: str,
    read: Callable[[Checkpoint], Blip2Config],
    ignore_generation_config: bool = True,
    image_size_px: int | None = None,
    adapter: str | None = None,
) -> ModelInfo:
    """Describe a model without loading weights (see `EngineConfig.info`).

    Args:
        model, revision: as in `resolve`.
        device, dtype: as in `ModelConfig`.
        read: returns the configuration of the checkpoint, and refuses those of another kind.
        ignore_generation_config, image_size_px, adapter: as in `EngineConfig`.

    Raises:
        ValueError: the checkpoint is of another kind, or this machine has no such device or dtype.
        OSError: the checkpoint cannot be found or fetched.
    """
    checkpoint = resolve(model, revision, with_weights=False, adapter=adapter)
    resolved_dtype = resolve_dtype(dtype, resolve_device(device))
    config = read(checkpoint)
    return ModelInfo(
        model=model,
        image_size_px=checkpoint.image_processor.image_size(config.vision_config, image_size_px),
        dtype=str(resolved_dtype).removeprefix("torch."),
        digest=checkpoint.digest(),
        vision_width=config.vision_config.hidden_size,
        qformer_width=config.qformer_config.hidden_size,
        num_queries=config.num_query_tokens,
        vocab_size=0 if checkpoint.is_retrieval else config.text_config.vocab_size,
        generation_config=checkpoint.generation_config(ignore_generation_config),
    )
