"""What stores of Google and Azure do otherwise than S3, on a store in memory that does the same."""

from __future__ import annotations

import io
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from typing import Any, ClassVar, cast

import pyarrow.fs as pafs
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from pipeline.inputs.stamps import stamp_of
from pipeline.storage import put, retrying
from pipeline.storage.filesystems import files_below, open_filesystem
from pipeline.storage.folder import Folder
from pipeline.storage.fsspec_errors import HandlerWithOSErrors
from tests.unit.fetching.web_server import ClosingServer

SIGNED = "http://127.0.0.1/bucket/probe?se=2026&sig=hidden"


class Store(MemoryFileSystem):
    """Not shared with other tests, unlike its parent class."""

    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    cachable = False


def folder_in(filesystem: MemoryFileSystem) -> Folder:
    handler = HandlerWithOSErrors(filesystem)
    return Folder("az://bucket/x", filesystem=pafs.PyFileSystem(handler), root="/bucket/x")


def test_a_folder_is_erased_file_by_file_if_the_store_does_not_take_it_whole():
    """Google's client says of a folder that is gone "No such directory", which was retried for 15 minutes."""

    class WithoutBatches(Store):
        def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
            if recursive:
                raise OSError("No such directory, or a batch that this store does not take")
            super().rm(path)

    folder = folder_in(WithoutBatches())
    for name in ("a/1", "a/b/2", "c/3"):
        folder.put(name, b"x")
    folder.erase("a")
    assert folder.names() == ["c/3"]
    folder.erase("a")
    assert folder.names() == ["c/3"]


def test_the_time_of_a_file_under_the_name_that_azure_gives_it():
    """Without it a changed input of the same size was not noticed, and status did not see the driver."""

    class OfAzure(Store):
        def info(self, path: str, **options: Any) -> dict[str, Any]:
            found = super().info(path, **options)
            found.pop("created", None)
            return {**found, "last_modified": datetime.now(UTC) - timedelta(seconds=90)}

    folder = folder_in(OfAzure())
    folder.put("a", b"x")
    age = folder.seconds_since_write("a")
    assert age is not None and 89 < age < 120
    (info,) = folder.filesystem.get_file_info([folder.path("a")])
    assert stamp_of(info).startswith("1@1")


def test_a_refusal_of_the_output_holds_no_signature(monkeypatch):
    """Arrow's client of Azure shows the whole request, over several lines."""
    folder = folder_in(Store())

    def refuse(*args: Any) -> None:
        raise OSError(f"UploadFrom failed for '{SIGNED}'\nAzure Error: [ContainerNotFound]\n\nRequest ID: 1")

    monkeypatch.setattr(Folder, "_put_once", refuse)
    with pytest.raises(
        ValueError, match=r"bucket/probe' Azure Error: \[ContainerNotFound\] Request"
    ) as refusal:
        folder.require_writable()
    assert "hidden" not in str(refusal.value) and "\n" not in str(refusal.value)


def test_where_a_file_shows_while_it_is_written_a_finished_one_is_moved(tmp_path, monkeypatch):
    """A retry that was killed in its commit cut the file of the shard: its rows were nowhere else."""

    def die(content: Any, stream: Any) -> None:
        stream.write(content[:2])
        raise KeyboardInterrupt

    folder = Folder(f"local://{tmp_path}/out")  # its parents are made too
    folder.put("a/b.parquet", b"before")
    with monkeypatch.context() as patched:
        patched.setattr(put, "_copy", die)
        with pytest.raises(KeyboardInterrupt):
            folder.put("a/b.parquet", b"after")
    assert folder.get("a/b.parquet") == b"before"
    assert sorted(name.partition("tmp/")[0] for name in folder.names()) == ["_blip2/", "a/b.parquet"]
    folder.put("a/b.parquet", b"after")
    assert folder.get("a/b.parquet") == b"after"
    folder.require_writable()


def test_a_file_that_arrives_cut_is_read_again(monkeypatch):
    """Half of a record must not be taken for the record."""
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 0.0)
    cut: list[int] = []

    class Cut(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            whole = super().read(size)
            if cut:
                return whole[: cut.pop()]
            return whole

    class Unsteady(Store):
        store: ClassVar[dict[str, Any]] = {}

        def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
            file = super()._open(path, mode, **options)
            return Cut(file.getvalue()) if mode == "rb" else file

    folder = folder_in(Unsteady())
    folder.put("a", b"whole")
    cut.append(2)
    with pytest.raises(OSError, match="a must have 5 bytes, got 2"):
        folder.get("a")
    cut.append(2)
    assert folder.with_retries(5.0).get("a") == b"whole"


def test_a_failed_move_leaves_no_temporary_file():
    """A store that was full got fuller with each retry."""

    class Full(Store):
        store: ClassVar[dict[str, Any]] = {}

        def mv(self, path1: str, path2: str, **options: Any) -> None:
            raise OSError("no space left")

    folder = folder_in(Full())
    with pytest.raises(OSError, match="no space left"):
        folder.put("a", b"x")
    assert folder.names() == []


def test_the_first_file_of_a_subfolder_is_uploaded_once(tmp_path, monkeypatch):
    folder = Folder(f"local://{tmp_path}/out")
    folder.put("_blip2/x", b"1")
    written: list[str] = []
    write = put._write

    def count(filesystem: Any, path: str, content: Any) -> None:
        written.append(path)
        write(filesystem, path, content)

    monkeypatch.setattr(put, "_write", count)
    folder.put("a/1.parquet", b"x")
    assert len(written) == 1 and folder.get("a/1.parquet") == b"x"


@pytest.mark.parametrize("is_told", [True, False])
def test_a_filesystem_that_replaces_no_file_is_no_output(is_told):
    """HDFS has an error for it, and its REST interface an answer that fsspec does not look at."""

    class KeepsTheFirst(Store):
        store: ClassVar[dict[str, Any]] = {}

        def mv(self, path1: str, path2: str, **options: Any) -> None:
            if not self.exists(path2):
                super().mv(path1, path2, **options)
            elif is_told:
                raise OSError("there is such a file")

    folder = folder_in(KeepsTheFirst())
    with pytest.raises(ValueError, match="output must be a folder that can be written"):
        folder.require_writable()
    assert [name for name in folder.names() if is_told or "tmp/" not in name] == []
    folder_in(Store()).require_writable()


@pytest.mark.parametrize(
    ("uri", "is_one"),
    [
        ("s3://bucket/x?region=eu-west-1", True),
        ("gs://anonymous@bucket/x", True),
        ("memory://x", False),
        ("local:///x", False),
        ("/x", False),
    ],
)
def test_in_object_stores_a_file_is_there_when_its_upload_is_complete(uri, is_one):
    filesystem, _ = open_filesystem(uri)
    assert put.is_object_store(filesystem) is is_one


def test_an_error_of_opening_a_store_is_not_that_there_is_a_file(monkeypatch):
    """An option that the client does not know read as a file of another driver."""

    def fail(*_: object) -> None:
        raise TypeError("unknown option")

    monkeypatch.setattr(put, "is_object_store", lambda _: True)
    monkeypatch.setattr(put, "fsspec_store", fail)
    with pytest.raises(TypeError, match="unknown option"):
        folder_in(Store()).put_new("a", b"x")


class NoUpload(BaseHTTPRequestHandler):
    """An S3 server that begins no upload."""

    asked: ClassVar[list[str]] = []

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append(f"{self.command} {self.path}")
        self.send_response(403 if self.path.endswith("?uploads=") or self.command == "POST" else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = do_PUT = do_POST = answer

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_an_upload_to_s3_that_cannot_begin_leaves_no_part_of_a_file():
    """Its first part, 10 MiB, became the object when the file was closed."""
    with ClosingServer(NoUpload) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        options = f"?endpoint_override=127.0.0.1:{server.server_port}&scheme=http&region=us-east-1"
        folder = Folder(f"s3://key:secret@bucket/out{options}")
        folder.put("small", b"x")
        NoUpload.asked.clear()
        with pytest.raises(OSError):
            folder.put("a.parquet", io.BytesIO(bytes(21 << 20)))
        server.shutdown()
    assert NoUpload.asked == ["POST /bucket/out/a.parquet?uploads"], NoUpload.asked


def test_a_write_that_fails_does_not_make_a_file_of_what_came_before():
    """Closing the file uploaded it, under the name of the finished one."""
    committed: list[bytes] = []

    class Upload(AbstractBufferedFile):
        num_tries = 0

        def _initiate_upload(self) -> None:
            pass

        def _upload_chunk(self, final: bool = False) -> bool:
            self.num_tries += 1
            if self.num_tries == 1:
                raise OSError("503 slow down")
            committed.append(self.buffer.getvalue())
            return True

    class Uploading(Store):
        def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
            return Upload(self, path, mode, block_size=4) if mode == "wb" else super()._open(path, mode)

    with pytest.raises(OSError, match="503"):
        folder_in(Uploading()).put("a.parquet", b"12345678")
    assert committed == []


def test_a_file_in_azure_is_there_when_it_has_content():
    """Arrow first makes an empty one; a shard whose worker died then counted as finished."""

    class Azure:
        type_name = "abfs"

        def get_file_info(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
            return [pafs.FileInfo(f"x/{size}.parquet", pafs.FileType.File, size=size) for size in (0, 9)]

    assert [name for name, *_ in files_below(cast(pafs.FileSystem, Azure()), "x")] == ["x/9.parquet"]
