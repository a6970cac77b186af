"""URIs resolve to filesystems; a URI that cannot be used is refused with what to do about it."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow.fs as pafs
import pytest

from pipeline.errors import InputError
from pipeline.storage import filesystems
from pipeline.storage.filesystems import at_once, join, open_filesystem


def test_local_paths_in_every_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b").write_bytes(b"x")
    for uri in ("a b", "~/a b", str(tmp_path / "a b"), f"file://{tmp_path}/a%20b"):
        filesystem, path = open_filesystem(uri)
        assert isinstance(filesystem, pafs.LocalFileSystem)
        assert filesystem.open_input_stream(path).read() == b"x"


def test_a_folder_may_have_the_name_of_a_scheme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_filesystem("./s3:/a")[1] == f"{tmp_path}/s3:/a"
    (tmp_path / "s3:").mkdir()
    assert open_filesystem("s3:/a")[1] == f"{tmp_path}/s3:/a"


def test_any_scheme_of_fsspec():
    filesystem, path = open_filesystem("memory://bucket/a")
    with filesystem.open_output_stream(path) as file:
        file.write(b"x")
    again, _ = open_filesystem("memory://bucket")
    assert [info.base_name for info in again.get_file_info(pafs.FileSelector("/bucket"))] == ["a"]


def test_s3_options_travel_in_the_uri():
    uri = "s3://key:secret@bucket/a/b?endpoint_override=localhost:1&scheme=http&region=eu-west-1"
    filesystem, path = open_filesystem(uri)
    assert isinstance(filesystem, pafs.S3FileSystem)
    assert (path, filesystem.region) == ("bucket/a/b", "eu-west-1")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "must not be empty, got ''; write . for the working folder"),
        ("s3://", "s3:// must name a bucket, as in s3://bucket/folder"),
        ("nosuch://x/y", "must be a local path, s3://, gs:// or a URI that fsspec knows: Protocol not known"),
        ("az://container/x", "needs a package that is not installed: Install adlfs"),
        ("s3://bucket/trip data/x", "write %20 for each blank"),
        ("s3://bucket/Grüße aus", "write %20 for each blank, %C3%9F for each ß, %C3%BC for each ü"),
        ("s3:/bucket/x", "s3:/bucket/x must have two slashes after s3:, or ./ before it if it is a folder"),
        ("s3://bucket//x", "s3://bucket//x must name its folders without //, . and .. between them"),
        (
            "s3://key:secret@bucket/a/../b?region=eu-west-1",
            "^s3://bucket/a/../b must name its folders without",
        ),
        ("gs://bucket/./x", "must name its folders without"),
        ("s3://bucket/out#1?region=eu-west-1", "without #, which ends its path; write %23 for each #"),
        ("file:///tmp/out#1", "write %23 for each #"),
        ("s3://bucket/x?region=us-east-1&nope=1", "fsspec knows: Unexpected query parameter"),
    ],
)
def test_a_uri_that_cannot_be_opened_is_refused_with_the_remedy(uri, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        open_filesystem(uri)


@pytest.mark.parametrize(
    "place", ["a.dfs.core.windows.net", "x@a.dfs.core.windows.net", "x@a.dfs.core.windows.net/y", "a@x/y"]
)
def test_azure_without_credentials_is_refused(place, monkeypatch):
    """Arrow ended the process, without an exception, when it opened a file or looked at a container."""
    for name in ("AZURE_TENANT_ID", "AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=rf"^abfs://{place} cannot be reached: no credentials were found"):
        open_filesystem(f"abfs://{place}?credential_kind=environment")


def test_an_account_of_azure_as_the_host_gives_paths_that_arrow_takes():
    options = "?credential_kind=anonymous"
    assert open_filesystem(f"abfs://a.dfs.core.windows.net/c/x{options}")[1] == "c/x"


def test_slashes_at_the_end_of_a_bucket_and_a_folder_are_no_names():
    for uri in ("s3://bucket/?region=eu-west-1", "s3://bucket/a//?region=eu-west-1&scheme=http"):
        assert open_filesystem(uri)[1].rstrip("/") in ("bucket", "bucket/a")


def test_join_below_any_root():
    assert join("/", "a") == "/a"
    assert join("bucket/x/", "a/b") == "bucket/x/a/b"


def test_requests_are_prepared_a_few_at_a_time(monkeypatch):
    """One for each of 300,000 files without an ending took 500 MB."""
    monkeypatch.setattr(filesystems, "MAX_WAITING_REQUESTS", 8)
    answered: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            assert number - len(answered) < 8
            yield number

    def request(number: int) -> int:
        answered.append(number)
        return 2 * number

    assert at_once(request, items()) == [2 * number for number in range(100)]
