"""The errors of a checkpoint that cannot be fetched name the cause, which decides what to do."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from huggingface_hub import DryRunFileInfo
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled

from blip2_actor import EngineConfig, MatchingConfig
from blip2_actor.checkpoints import download
from blip2_actor.checkpoints.checkpoint import Checkpoint, resolve
from blip2_actor.checkpoints.download import cache_folder, fetch_from_bucket, fetch_from_hub
from blip2_actor.flags import with_flags
from pipeline.settings.job_settings import ScoreSettings

RESPONSE: Any = SimpleNamespace(headers={}, request=None)
"""The parts of a response that the hub's errors use."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RepositoryNotFoundError("404", response=RESPONSE), "hub has no model 'some/model'"),
        (RevisionNotFoundError("404", response=RESPONSE), "revision must be a commit, tag or branch .*'v9'"),
        (LocalEntryNotFoundError("no network"), r"the hub \(.*\) cannot be reached"),
        (ConnectionResetError("reset"), r"the hub \(.*\) cannot be reached"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "cannot be stored .*No space left.*free disk space",
        ),
    ],
    ids=["model", "revision", "network", "reset", "disk"],
)
def test_errors_of_the_hub_name_their_cause(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistyped revision or a full disk must not be reported as a problem of the network."""

    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(download, "snapshot_download", fail)
    with pytest.raises(OSError, match=message):
        fetch_from_hub("some/model", "v9", with_weights=True)


@pytest.mark.parametrize("model", ["demo", ".", "memory://models/one"])
def test_a_revision_of_a_model_with_one_version_is_refused(model: str) -> None:
    """The revision used to be ignored, so captions came from other weights than the user had named."""
    with pytest.raises(ValueError, match=r"^the revision must be left out unless .* got 'v9' for"):
        resolve(model, "v9")


@pytest.mark.parametrize(
    ("model", "revision", "message"),
    [
        ("demo", "v9", "the revision must be left out unless .* got 'v9' for 'demo'"),
        ("some/model", "v9", "the revision must be a commit, tag or branch of some/model, got 'v9'"),
        ("nosuch", None, "the model must be an existing folder.* got 'nosuch'"),
        ("s3://user:secret@bucket/model", None, "the model must hold no password"),
    ],
)
def test_errors_of_a_retrieval_checkpoint_name_no_setting_of_another_model(
    model: str, revision: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of --score-revision and --score-model used to be reported as those of --revision and --model."""

    def fail(*_: object, **__: object) -> str:
        raise RevisionNotFoundError("404", response=RESPONSE)

    monkeypatch.setattr(download, "snapshot_download", fail)
    with pytest.raises((OSError, ValueError)) as raised:
        MatchingConfig(model=model, revision=revision).info()
    assert re.match(message, with_flags(str(raised.value), ScoreSettings)), raised.value


def test_any_error_of_a_store_becomes_an_oserror(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its class tells callers a checkpoint that cannot be read from a bug in the program."""
    store = fsspec.filesystem("memory")
    store.pipe("/fetching/config.json", b"{}")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("token expired")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(type(store), "get_file", fail)
    with pytest.raises(OSError, match=r"config\.json of memory://fetching cannot be fetched .*token expired"):
        fetch_from_bucket("memory://fetching", with_weights=True)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder, _ = fetch_from_bucket("memory://fetching", with_weights=True)
    assert (folder / "config.json").read_bytes() == b"{}"


def test_a_cache_that_cannot_be_written_costs_only_what_would_be_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Containers have read-only homes. Files from a bucket must be stored, so there the message says how."""
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = Checkpoint(checkpoint).digest()
    assert caplog.text == ""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert Checkpoint(checkpoint).digest() == kept
    assert "cannot be written" in caplog.text
    fsspec.filesystem("memory").pipe("/kept/config.json", b"{}")
    with pytest.raises(OSError, match=r"cannot be stored in .*set XDG_CACHE_HOME"):
        fetch_from_bucket("memory://kept", with_weights=True)


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a container, a uid often has neither HOME nor a line in /etc/passwd; the import used to fail."""

    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    usual = cache_folder()
    assert usual.parent == tmp_path and usual.stat().st_mode & 0o777 == 0o700
    others = tmp_path / "others"
    (others / usual.name).mkdir(parents=True)
    (others / usual.name).chmod(0o777)  # as another user might leave it, for files that this one would read
    monkeypatch.setattr("tempfile.tempdir", str(others))
    made = cache_folder()
    assert made != others / usual.name and made.stat().st_mode & 0o777 == 0o700
    assert cache_folder() == made


@pytest.mark.parametrize("stored", ["model.safetensors", "pytorch_model.bin"])
def test_older_weights_are_fetched_only_without_safetensors(
    stored: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Many repositories hold both: 15 GB in each format."""
    fetched: list[str] = []

    def snapshot_download(
        model: str, revision: str | None, allow_patterns: list[str], dry_run: bool = False
    ) -> str | list[DryRunFileInfo]:
        if dry_run:
            return []
        for name in ("config.json", stored, "pytorch_model.bin", "training.bin"):
            if any(Path(name).match(pattern) for pattern in allow_patterns):
                (tmp_path / name).touch()
                fetched.append(name)
        return str(tmp_path)

    monkeypatch.setattr(download, "snapshot_download", snapshot_download)
    fetch_from_hub("some/model", "v9", with_weights=False)
    assert fetched == ["config.json"]
    fetch_from_hub("some/model", "v9", with_weights=True)
    assert set(fetched) == {"config.json", stored}


def _dry_run(num_bytes: int, folder: Path) -> Any:
    """Return a stand-in for `snapshot_download` with one file that is not in the cache."""
    missing = DryRunFileInfo("c0ffee", num_bytes, "model.safetensors", str(folder), False, True)

    def snapshot_download(*_: object, dry_run: bool = False, **__: object) -> str | list[DryRunFileInfo]:
        (folder / "model.safetensors").touch()
        return [missing] if dry_run else str(folder)

    return snapshot_download


def test_a_large_download_is_announced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(download.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "snapshot_download", _dry_run(200_000_000, tmp_path))
    fetch_from_hub("some/model", None, with_weights=True)
    assert caplog.messages[0].startswith(f"fetching some/model: 0.2 GB to {tmp_path}/cache (")


@pytest.mark.parametrize("num_bytes", [1_000, 200_000_000])
def test_only_a_large_download_draws_bars(
    num_bytes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The client used to draw five bars for a configuration, in the middle of the line with the size."""
    monkeypatch.setattr(download.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download.constants, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    drawn: list[tuple[bool, bool]] = []
    answer = _dry_run(num_bytes, tmp_path)

    def snapshot_download(*args: object, dry_run: bool = False, **values: object) -> Any:
        drawn.append((dry_run, not are_progress_bars_disabled()))
        return answer(*args, dry_run=dry_run, **values)

    monkeypatch.setattr(download, "snapshot_download", snapshot_download)
    fetch_from_hub("some/model", None, with_weights=True)
    assert drawn == [(True, False), (False, num_bytes > download.SMALL_BYTES)]
    assert not are_progress_bars_disabled(), "other downloads of the program draw theirs"


def test_a_checkpoint_that_does_not_fit_is_refused_before_the_download(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(download.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "snapshot_download", _dry_run(10**18, tmp_path))
    with pytest.raises(OSError, match=r"needs 1000000000\.0 GB in .*HF_HOME to a larger disk"):
        fetch_from_hub("some/model", None, with_weights=True)


@pytest.mark.parametrize("with_weights", [False, True])
def test_a_cached_checkpoint_needs_no_hub(
    with_weights: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only a hub that answers can tell the size of a download."""
    commit = "0123456789abcdef" * 2 + "01234567"
    repository = tmp_path / "models--some--model"
    folder = repository / "snapshots" / commit
    for path, text in (
        (repository / "refs" / "main", commit),
        (folder / "config.json", "{}"),
        (folder / "model.safetensors", ""),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(download.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(download.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(download.constants, "ENDPOINT", "http://127.0.0.1:1")
    assert fetch_from_hub("some/model", None, with_weights) == (folder, commit)
    with pytest.raises(OSError, match=r"'other/model' is not on this machine and the hub \(.*:1\) cannot"):
        fetch_from_hub("other/model", None, with_weights)


@pytest.mark.parametrize("field", ["model", "adapter"])
@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:S3CRET@bucket/model",
        "https://S3CRET@example.com/model",
        "https://user:S3CRET@example.com/checkpoint.pth",
        "az://container@account/model?sv=1&sig=S3CRET",
    ],
)
def test_a_name_with_a_password_is_refused_and_not_said(field: str, uri: str) -> None:
    """The name used to be written to the run's record, its report and the labels of metrics."""
    given: dict[str, Any] = {"model": "demo", field: uri}
    with pytest.raises(ValueError, match=f"^(the )?{field} must hold no password") as refused:
        EngineConfig(**given).info()
    assert "S3CRET" not in str(refused.value) and "AZURE_STORAGE_SAS_TOKEN" in str(refused.value)
