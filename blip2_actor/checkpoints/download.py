"""Checkpoints from elsewhere: the files of a hub repository or of a bucket's folder, onto this machine.

Files are fetched once per machine, each whole or not at all. What a checkpoint *is* stands in its small
files: a driver that only describes it fetches those, the weights go where an engine is built. The content
has the same name on both: the hub's commit, or a digest of the bucket's listing.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import filelock
import fsspec
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from blip2_actor.installation import install_hint

DESCRIPTION = ("*.json", "*.txt", "*.model")
"""Configurations and tokenizers."""
FILES = (*DESCRIPTION, "*.safetensors")
CACHE_FOLDER = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "blip2"
_VERSIONS = ("ETag", "md5Hash", "etag", "LastModified", "mtime", "created")
"""What stores call a file's version in their listings, the most telling first."""


def write_whole(path: Path, text: str) -> None:
    """Write a small file that whoever reads it meanwhile finds whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    partial.write_text(text)
    partial.rename(path)


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(Path(name).match(pattern) for pattern in patterns)


def fetch_from_hub(model: str, revision: str | None, patterns: Sequence[str]) -> tuple[Path, str]:
    """Folder and commit of a hub repository; raises OSError where it cannot be had."""
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns)))
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"model must exist on the hub, got {model!r}; check its spelling or log in"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"revision must be a commit, tag or branch of {model}, got {revision!r}; check its spelling"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError, TimeoutError) as error:
        raise OSError(
            f"{model!r} is not on this machine and the hub cannot be reached ({type(error).__name__}); "
            'give --model a folder, an s3:// or gs:// folder, or "demo", or run where the hub can be reached'
        ) from error
    except OSError as error:
        raise OSError(
            f"{model!r} cannot be stored on this machine ({error}); make room, or set HF_HOME elsewhere"
        ) from error
    return folder, folder.name


def fetch_from_bucket(uri: str, patterns: Sequence[str]) -> tuple[Path, str]:
    """Folder on this machine and digest of a bucket's folder; raises OSError where it cannot be had."""
    filesystem, listed = _list(uri)
    versions = {
        Path(entry["name"]).name: (entry["size"], str(next((entry[v] for v in _VERSIONS if v in entry), "")))
        for entry in listed
    }
    digest = hashlib.sha256(json.dumps(sorted(versions.items())).encode()).hexdigest()[:32]
    folder = CACHE_FOLDER / "checkpoints" / digest
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        for entry in listed:
            target = folder / Path(entry["name"]).name
            if matches(target.name, patterns) and not target.exists():
                partial = target.with_name(f"{target.name}.partial")
                try:
                    filesystem.get_file(entry["name"], str(partial))
                except Exception as error:  # every store's library has exceptions of its own
                    raise OSError(
                        f"{target.name} of {uri} cannot be fetched to {folder} "
                        f"({type(error).__name__}: {error}); try again, or make room there"
                    ) from error
                partial.rename(target)
    return folder, digest


def _list(uri: str) -> tuple[Any, list[dict[str, Any]]]:
    """The store, and its entries for the checkpoint's files."""
    try:
        filesystem, root = fsspec.core.url_to_fs(uri)
        filesystem.invalidate_cache(root)
        entries = filesystem.ls(root, detail=True)
    except ImportError as error:
        hint = install_hint(uri.partition("://")[0])
        raise OSError(f"{uri} needs a package that is not installed: {error}{hint}") from error
    except Exception as error:  # every store's library has exceptions of its own
        raise OSError(f"{uri} must be a readable folder, got {type(error).__name__}: {error}") from error
    listed = [e for e in entries if e["type"] == "file" and matches(e["name"], FILES)]
    if not listed:
        raise FileNotFoundError(f"{uri} must hold a checkpoint's files, got none of {', '.join(FILES)}")
    return filesystem, listed
