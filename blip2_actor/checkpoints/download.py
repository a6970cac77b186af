"""Fetching a remote checkpoint: the files of a hub repository or of a bucket's folder.

Files are fetched once per machine, each whole or not at all. The small files describe a checkpoint, so a
driver fetches only those; the weights are fetched where an engine is built. Both identify the content in the
same way: by the hub's commit, or by a digest of the bucket's listing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

import filelock
import fsspec
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars

from blip2_actor.checkpoints.hub_patience import retry_while_busy
from blip2_actor.checkpoints.weights.lavis import SUFFIX as LAVIS_SUFFIX
from blip2_actor.checkpoints.weights.weight_files import has_safetensors, unread_weights
from blip2_actor.installation import install_hint

logger = logging.getLogger(__name__)

DESCRIPTION = ("*.json", "*.txt", "*.model")
"""Patterns of the files that describe a checkpoint: configurations and tokenizers."""
SAFETENSORS = ("*.safetensors",)
PICKLES = ("pytorch_model*.bin", "adapter_model.bin")
"""Patterns of older weights, which count only without safetensors."""
WEIGHTS = (*SAFETENSORS, *PICKLES)
SMALL_BYTES = 100_000_000
"""Downloads up to this size are not announced."""
_VERSIONS = ("ETag", "md5Hash", "etag", "LastModified", "mtime", "created")
"""Names of a file's version in the listings of different stores, the most specific first."""


def cache_folder() -> Path:
    """Return the folder for what can be fetched or computed again; it need not exist yet.

    A user without a home, as in a container without an entry for its uid, has it among temporary files; it
    is made at once, so that nobody else can make it.
    """
    if place := os.environ.get("XDG_CACHE_HOME"):
        return Path(place) / "blip2"
    try:
        return Path.home() / ".cache" / "blip2"
    except RuntimeError:
        return _folder_of_this_user(tempfile.gettempdir())


@cache
def _folder_of_this_user(parent: str) -> Path:
    """Return a folder that no other user can write to; one of this process if the usual one is another's."""
    usual = Path(parent) / f"blip2-{os.getuid()}"
    with suppress(OSError):  # no folder, or nothing can be made here, which is said where something is kept
        usual.mkdir(mode=0o700, exist_ok=True)
        found = usual.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return usual
    with suppress(OSError):
        return Path(tempfile.mkdtemp(prefix=f"{usual.name}-", dir=parent))
    return usual.with_name(f"{usual.name}-{uuid.uuid4().hex}")


def write_cached(path: Path, text: str) -> None:
    """Write a small file of the cache so that a concurrent reader finds it whole or not at all.

    If it cannot be written, that is logged only: an engine works without it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        partial.write_text(text)
        partial.rename(path)
    except OSError as error:
        logger.warning(
            "%s cannot be written (%s), so the next start computes it again; set XDG_CACHE_HOME to a folder "
            "that can be written",
            path,
            error,
        )


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(Path(name).match(pattern) for pattern in patterns)


def select_files(names: Iterable[str]) -> list[str]:
    """Return those of a folder's file names that make the checkpoint: no weights that are not read."""
    names = sorted(names)
    unread = unread_weights(names)
    return [
        name
        for name in names
        if matches(name, DESCRIPTION) or (matches(name, WEIGHTS) and name not in unread)
    ]


def require_linked_files(folder: Path) -> None:
    """Raise FileNotFoundError for a link without its file, as in a part of the hub's cache copied alone."""
    for name in select_files(path.name for path in folder.iterdir()):
        path = folder / name
        if path.is_symlink() and not path.exists():
            raise FileNotFoundError(
                f"{path} must be a file, got a link to {os.readlink(path)}, which does not exist; copy the "
                "checkpoint with the files that its links name, as cp -rL does"
            )


def fetch_from_hub(model: str, revision: str | None, with_weights: bool) -> tuple[Path, str]:
    """Fetch a hub repository; return its folder on this machine and its commit.

    Older weights are fetched only if there are no safetensors; many repositories hold both.

    Raises:
        OSError: there is no such repository or revision, or it cannot be fetched.
    """
    try:
        folder = _download(model, revision, (*DESCRIPTION, *SAFETENSORS) if with_weights else DESCRIPTION)
        if with_weights and not has_safetensors(path.name for path in folder.iterdir()):
            _download(model, folder.name, PICKLES)
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"the hub has no model {model!r}, or it is private; check its spelling, or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"the revision must be a commit, tag or branch of {model}, got {revision!r}; check its spelling"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError, TimeoutError) as error:
        raise OSError(
            f"{model!r} is not on this machine and {_hub()} cannot be reached ({type(error).__name__}); "
            "connect this machine to the hub, set HF_ENDPOINT to a mirror, or name a folder, an s3:// or "
            'gs:// folder, or "demo"'
        ) from error
    except OSError as error:
        raise OSError(
            f"{model!r} cannot be stored on this machine ({error}); free disk space, or set HF_HOME to a "
            "larger disk"
        ) from error
    return folder, folder.name


def _hub() -> str:
    return (
        "the hub (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else f"the hub ({constants.ENDPOINT})"
    )


def _download(model: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Bring files of a hub repository into the hub's cache, with patience; say so first if they are large.

    Raises:
        OSError: they do not fit there, or as from the hub's own function.
    """
    chosen, missing_bytes = list(patterns), 0
    if not constants.HF_HUB_OFFLINE and not set(patterns) <= set(DESCRIPTION):
        with suppress(DryRunError):  # the hub does not answer, and the files may be in the cache
            with _without_bars():
                files = retry_while_busy(
                    lambda: snapshot_download(model, revision=revision, allow_patterns=chosen, dry_run=True)
                )
            missing_bytes = sum(file.file_size or 0 for file in files if file.will_download)
            if missing_bytes > SMALL_BYTES:
                _announce(model, missing_bytes)
    with nullcontext() if missing_bytes > SMALL_BYTES else _without_bars():
        return Path(
            retry_while_busy(lambda: snapshot_download(model, revision=revision, allow_patterns=chosen))
        )


def _without_bars() -> AbstractContextManager[object]:
    """Let the hub's client draw no bars unless the user wants them: it draws several for a few kilobytes."""
    return nullcontext() if constants.HF_HUB_DISABLE_PROGRESS_BARS is False else disable_progress_bars()


def _announce(model: str, missing_bytes: int) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    disk = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free_bytes = shutil.disk_usage(disk).free
    if missing_bytes > free_bytes:
        raise OSError(
            f"it needs {missing_bytes / 1e9:.1f} GB in {cache}, where {free_bytes / 1e9:.1f} GB are free"
        )
    sizes = (missing_bytes / 1e9, cache, free_bytes / 1e9)
    logger.warning("fetching %s: %.1f GB to %s (%.0f GB free)", model, *sizes)


def fetch_from_bucket(uri: str, with_weights: bool) -> tuple[Path, str]:
    """Fetch a bucket's folder, or one file of LAVIS; return its folder here and a digest of its listing.

    Raises:
        OSError: it cannot be read, holds no checkpoint, or cannot be stored here.
    """
    filesystem, entries = _list(uri)
    versions = {
        Path(entry["name"]).name: (entry["size"], str(next((entry[v] for v in _VERSIONS if v in entry), "")))
        for entry in entries
    }
    digest = hashlib.sha256(json.dumps(sorted(versions.items())).encode()).hexdigest()[:32]
    folder = cache_folder() / "checkpoints" / digest
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(f"{folder}.lock").acquire()
    except OSError as error:
        raise OSError(
            f"{uri} cannot be stored in {folder} ({error}); set XDG_CACHE_HOME to a folder that can be "
            "written"
        ) from error
    with lock:
        for entry in entries:
            target = folder / Path(entry["name"]).name
            if (with_weights or matches(target.name, DESCRIPTION)) and not target.exists():
                partial = target.with_name(f"{target.name}.partial")
                try:
                    filesystem.get_file(entry["name"], str(partial))
                except Exception as error:  # each store's library has its own exceptions
                    raise OSError(
                        f"{target.name} of {uri} cannot be fetched to {folder} "
                        f"({type(error).__name__}: {error}); try again, or free disk space there"
                    ) from error
                partial.rename(target)
    return folder, digest


def read_from_bucket(uri: str) -> bytes:
    """Return the content of a small file in a bucket.

    Raises:
        OSError: it cannot be read.
    """
    with _errors_named(uri):
        filesystem, path = fsspec.core.url_to_fs(uri)
        return bytes(filesystem.cat_file(path))


@contextmanager
def _errors_named(uri: str) -> Iterator[None]:
    """Turn what goes wrong in a store into an OSError with a sentence."""
    try:
        yield
    except ImportError as error:
        hint = install_hint(uri.partition("://")[0])
        raise OSError(f"{uri} needs a package that is not installed: {error}{hint}") from error
    except Exception as error:  # each store's library has its own exceptions
        raise OSError(f"{uri} cannot be read ({type(error).__name__}: {error}); check its name") from error


def _list(uri: str) -> tuple[Any, list[dict[str, Any]]]:
    """Return the store's filesystem and its entries for the checkpoint's files."""
    with _errors_named(uri):
        filesystem, root = fsspec.core.url_to_fs(uri)
        filesystem.invalidate_cache(root)
        entries = filesystem.ls(root, detail=True)
    by_name = {Path(entry["name"]).name: entry for entry in entries if entry["type"] == "file"}
    files = [by_name[name] for name in ([*by_name] if uri.endswith(LAVIS_SUFFIX) else select_files(by_name))]
    if not files:
        raise FileNotFoundError(
            f"{uri} holds no checkpoint: it has no file {', '.join((*DESCRIPTION, *WEIGHTS))}; name the "
            "folder of a checkpoint"
        )
    return filesystem, files
