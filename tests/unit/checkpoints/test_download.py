"""What is said when a checkpoint cannot be fetched: whose fault it is decides what to do."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from blip2_actor.checkpoints import download as fetching
from blip2_actor.checkpoints.download import FILES, fetch_from_bucket, fetch_from_hub

RESPONSE = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RepositoryNotFoundError("404", response=RESPONSE), "hub has no model 'some/model'"),
        (RevisionNotFoundError("404", response=RESPONSE), "revision must be a commit, tag or branch .*'v9'"),
        (LocalEntryNotFoundError("no network"), "the hub cannot be reached"),
        (ConnectionResetError("reset"), "the hub cannot be reached"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "cannot be stored .*No space left.*free disk space",
        ),
    ],
    ids=["model", "revision", "network", "reset", "disk"],
)
def test_the_hub_is_blamed_only_for_itself(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistyped revision or a full disk sent people to look at their network."""

    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(fetching, "snapshot_download", fail)
    with pytest.raises(OSError, match=message):
        fetch_from_hub("some/model", "v9", FILES)


def test_whatever_a_store_raises_is_an_oserror(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hosts tell a checkpoint that cannot be read from a mistake in the program by that."""
    store = fsspec.filesystem("memory")
    store.pipe("/fetching/config.json", b"{}")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("token expired")

    monkeypatch.setattr(fetching, "CACHE_FOLDER", tmp_path)
    monkeypatch.setattr(type(store), "get_file", fail)
    with pytest.raises(OSError, match=r"config\.json of memory://fetching cannot be fetched .*token expired"):
        fetch_from_bucket("memory://fetching", FILES)
    monkeypatch.undo()
    monkeypatch.setattr(fetching, "CACHE_FOLDER", tmp_path)
    folder, _ = fetch_from_bucket("memory://fetching", FILES)
    assert (folder / "config.json").read_bytes() == b"{}"
