"""Whatever the client of a store raises arrives as an OSError of the right kind, without secrets."""

from __future__ import annotations

from json import JSONDecodeError
from types import SimpleNamespace

import pyarrow.fs as pafs
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.storage.fsspec_errors import HandlerWithOSErrors, oserrors
from pipeline.storage.retrying import InvalidArgument


class ClientError(Exception):
    """An error of a client, which is no OSError."""

    def __init__(self, text: str = "failed", **attributes: object) -> None:
        super().__init__(text)
        self.__dict__.update(attributes)


def raised_for(error: Exception) -> Exception:
    with pytest.raises(Exception) as caught, oserrors():
        raise error
    return caught.value


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ClientError(status=503), OSError),  # aiohttp
        (ClientError(status=404), FileNotFoundError),
        (ClientError(response=SimpleNamespace(status_code=403)), PermissionError),  # httpx, requests
        (ClientError(response={"ResponseMetadata": {"HTTPStatusCode": 404}}), FileNotFoundError),  # botocore
        (ClientError(status_code=410), FileNotFoundError),  # azure
        (ClientError(code="401"), PermissionError),  # gcsfs
        (ClientError(), OSError),
        (JSONDecodeError("a body that is no JSON", "<html>", 0), OSError),
        (ValueError("Repository id must be 'namespace/name'"), InvalidArgument),  # huggingface_hub
        (ValueError("Bad Request: 503 invalid"), OSError),  # gcsfs
        (TimeoutError("slow"), TimeoutError),
        (PermissionError("no"), PermissionError),
    ],
)
def test_the_kind_of_error_follows_from_the_answer(error, kind):
    assert type(raised_for(error)) is kind


def test_a_missing_file_behind_which_a_503_stands_is_not_missing():
    """fsspec's HTTP filesystem raises FileNotFoundError whatever the server has answered."""
    missing = FileNotFoundError("http://host/a.tar")
    missing.__cause__ = ClientError(status=503)
    assert type(raised_for(missing)) is OSError
    missing.__cause__ = ClientError(status=404)
    assert type(raised_for(missing)) is FileNotFoundError


@pytest.mark.parametrize("mistake", [TypeError, AttributeError, KeyError, NotImplementedError])
def test_a_mistake_of_the_program_keeps_its_type(mistake):
    assert type(raised_for(mistake("bug"))) is mistake


def test_no_message_holds_a_secret():
    said = str(raised_for(ClientError("503 for url='https://me:pw@host/a?sig=hidden'", status=503)))
    assert said == "ClientError: 503 for url='https://host/a'"
    assert "sig" not in str(raised_for(OSError("503 for https://host/a?sig=hidden")))


def test_a_folder_that_another_process_makes_meanwhile_is_listed(monkeypatch):
    """Arrow asks whether it is a folder, then whether it is there: `status` said that it is no folder."""
    store = MemoryFileSystem(skip_instance_cache=True)
    is_folder = store.isdir

    def written_after_the_question(path: str) -> bool:
        found = is_folder(path)
        store.pipe("/meanwhile/a", b"1")
        return found

    monkeypatch.setattr(store, "isdir", written_after_the_question)
    folder = pafs.FileSelector("/meanwhile", allow_not_found=True)
    try:
        [file] = HandlerWithOSErrors(store).get_file_info_selector(folder)
    finally:
        store.rm("/meanwhile", recursive=True)
    assert file.base_name == "a"
