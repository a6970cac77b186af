"""A web server that fails for a moment costs no row; one that goes on failing costs its shard alone."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from itertools import count
from random import Random

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.inputs import size_estimate, stamps
from pipeline.inputs.listing import list_shards
from pipeline.inputs.reader import ReadOptions, ShardWork
from pipeline.inputs.shards import Shard, with_secrets, without_secrets
from pipeline.inputs.size_estimate import estimate_size
from pipeline.inputs.stamps import read_unchanged, sample_digest
from pipeline.storage import fsspec_errors, retrying, retrying_file, whole_files
from tests.unit.fetching.web_server import ClosingServer
from tests.unit.inputs.formats.reading_cases import read_rows, tar_bytes

random = Random(0)
CONTENT = tar_bytes((f"{at}.jpg", random.randbytes(1 << 20)) for at in range(16))
"""More than the read-ahead of a tar and than a block of fsspec, so that it is read in several requests."""


class Server(BaseHTTPRequestHandler):
    """Serves `CONTENT` under every name, in the way that a test has set."""

    protocol_version = "HTTP/1.1"
    num_gets = 0
    answer: Callable[[Server, int], bool] = staticmethod(lambda server, number: False)
    """Takes a GET and its number; returns whether it has answered it itself."""
    knows_ranges = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionResetError, BrokenPipeError):
            pass  # A client need not read to the end.

    def do_HEAD(self) -> None:
        self.send(200, b"", [("Content-Length", str(len(CONTENT)))])

    def do_GET(self) -> None:
        Server.num_gets += 1
        if Server.answer(self, Server.num_gets):
            return
        asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or not Server.knows_ranges:
            self.send(200, CONTENT)
        else:
            self.send(206, CONTENT[int(asked[1]) : int(asked[2]) + 1])

    def send(self, status: int, body: bytes, headers: list[tuple[str, str]] | None = None) -> None:
        self.send_response(status)
        for name, value in headers or [("Content-Length", str(len(body)))]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def slow_down(server: Server) -> None:
    server.send(429, b"")


def unavailable(server: Server) -> None:
    server.send(503, b"")


def cut(server: Server) -> None:
    server.send(206, CONTENT[:100], [("Content-Length", "1000")])
    server.close_connection = True


def hang_up(server: Server) -> None:
    server.close_connection = True


@pytest.fixture
def shard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shard]:
    monkeypatch.setattr(Server, "num_gets", 0)
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(fsspec_errors, "WHOLE_FILES", whole_files.WholeFiles())
    with ClosingServer(Server) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}"
        yield Shard(name="s", format="webdataset", root=root, files=("a.tar",))
        server.shutdown()


def always(fault: Callable[[Server], None], every: int) -> Callable[[Server, int], bool]:
    def answer(server: Server, number: int) -> bool:
        if number % every:
            return False
        fault(server)
        return True

    return staticmethod(answer)


def test_a_server_need_not_tell_how_large_a_file_is(shard, monkeypatch):
    """Its tars were refused: invalid literal for int() with base 10: 'None'."""

    def send_until_close(server: Server, body: bytes) -> bool:
        server.send(200, body, [("Connection", "close")])
        server.close_connection = True
        return True

    monkeypatch.setattr(Server, "do_HEAD", lambda server: send_until_close(server, b""))
    monkeypatch.setattr(Server, "answer", staticmethod(lambda server, _: send_until_close(server, CONTENT)))
    monkeypatch.setattr(size_estimate, "SCANNED_ROWS_PER_TAR", 4)
    (listed,) = list_shards(f"{shard.root}/a.tar")
    assert listed.size_bytes is None
    rows, report = read_rows(listed)
    assert (len(rows), report.complete) == (16, True)
    estimate = estimate_size([listed] * 20)
    assert (estimate.num_rows, estimate.is_counted) == (80, False), "the plan divided by 0"


@pytest.mark.parametrize("fault", [slow_down, unavailable, cut, hang_up])
def test_a_request_that_fails_is_made_again(shard, monkeypatch, fault):
    """The errors of aiohttp are no OSErrors; each of these ended the job with a traceback."""
    monkeypatch.setattr(Server, "answer", always(fault, every=2))
    rows, report = read_rows(shard)
    assert (len(rows), report.complete) == (16, True)
    assert Server.num_gets >= 3


def dated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the server tell when its file was changed; return the date, which may be replaced."""
    dates = ["Mon, 02 Nov 2026 10:00:00 GMT"]

    def head(server: Server) -> None:
        size = ("Content-Length", str(len(CONTENT)))
        server.send(200, b"", [size, *(("Last-Modified", date) for date in dates)])

    monkeypatch.setattr(Server, "do_HEAD", head)
    return dates


@pytest.mark.parametrize("moment", ["before", "after digest", "during"])
def test_a_file_replaced_by_one_of_the_same_size_gives_no_row(shard, monkeypatch, moment):
    """The time of a file on a web server was not kept, and rows of two files were mixed."""
    dates = dated(monkeypatch)
    (listed,) = list_shards(f"{shard.root}/{moment.replace(' ', '_')}.tar")

    def replace_it() -> None:
        other = tar_bytes((f"{at}.jpg", random.randbytes(1 << 20)) for at in range(16))
        assert len(other) == len(CONTENT)
        monkeypatch.setattr(sys.modules[__name__], "CONTENT", other)
        dates[:] = ["Mon, 02 Nov 2026 10:00:05 GMT"]

    def digest_and_replace(shard: Shard) -> str:
        digest = sample_digest(shard)
        if moment == "after digest":
            replace_it()
        return digest

    monkeypatch.setattr(stamps, "sample_digest", digest_and_replace)
    if moment == "before":
        replace_it()
    reader, report = read_unchanged(ShardWork(shard=listed), ReadOptions(table_rows=1)), None
    try:
        for number in count():
            next(reader)
            if number == 0 and moment == "during":
                replace_it()
    except StopIteration as end:
        report = end.value
    assert report is not None and report.changed


def test_a_time_that_a_server_tells_only_now_is_no_change():
    for known in ("9@", "9@5", ""):
        assert stamps.may_be_same(known, "9@5") and stamps.may_be_same("9@5", known)
        assert stamps.merged(known, "9@5") == stamps.merged("9@5", known) == "9@5"
    assert not stamps.may_be_same("8@", "9@5") and not stamps.may_be_same("9@5", "9@6")


def test_a_file_that_cannot_be_compared_after_reading_is_partial(shard, monkeypatch):
    """The failure of the last request was taken for an unchanged file."""
    monkeypatch.setattr(stamps, "READ_FOR_S", 0.01)
    dated(monkeypatch)
    (listed,) = list_shards(f"{shard.root}/a.tar")
    reader = read_unchanged(ShardWork(shard=listed), ReadOptions(table_rows=1))
    try:
        while True:
            table = next(reader)
            if table["row"][0].as_py() == 15:
                monkeypatch.setattr(Server, "do_HEAD", unavailable)
                monkeypatch.setattr(Server, "answer", always(unavailable, every=1))
    except StopIteration as end:
        report = end.value
    assert not report.complete and "does not tell whether" in report.reason


def test_a_request_for_a_whole_file_needs_a_whole_answer(shard, monkeypatch):
    """HTTP 416 ended the read task: I/O operation on closed file."""
    filesystem = fsspec.filesystem("http", skip_instance_cache=True)
    monkeypatch.setattr(Server, "answer", staticmethod(lambda server, _: server.send(416, b"") or True))
    with pytest.raises(OSError, match="416"):
        whole_files.WholeFiles().open(filesystem, f"{shard.root}/a.tar", must=True)


def test_a_server_that_cannot_send_parts_of_a_file_sends_it_whole(shard, monkeypatch):
    """Python's own http.server is one."""
    monkeypatch.setattr(Server, "knows_ranges", False)
    rows, report = read_rows(shard)
    assert (len(rows), report.complete) == (16, True)


@pytest.mark.parametrize("says_so", [True, False])
def test_a_server_that_cannot_send_parts_of_a_file_sends_it_once(shard, monkeypatch, says_so):
    """It was sent for the digest of the shard and again for its rows, and begun four times more."""
    sent = []
    send = Server.send

    def count(server: Server, status: int, body: bytes, headers: list[tuple[str, str]] | None = None) -> None:
        sent.append(len(body))
        send(server, status, body, headers)

    if says_so:
        headers = [("Content-Length", str(len(CONTENT))), ("Accept-Ranges", "none")]
        monkeypatch.setattr(Server, "do_HEAD", lambda server: send(server, 200, b"", headers))
    monkeypatch.setattr(Server, "send", count)
    monkeypatch.setattr(Server, "knows_ranges", False)
    (listed,) = list_shards(f"{shard.root}/once.tar")
    reader = read_unchanged(ShardWork(shard=listed), ReadOptions())
    assert sum(map(len, reader)) == 16
    assert sum(sent) == len(CONTENT)


def test_whole_files_are_fetched_at_the_same_time(shard, monkeypatch):
    """The images of a server that sends no parts came one after the other, as `python -m http.server`."""
    together = threading.Barrier(2)

    def wait(server: Server, number: int) -> bool:
        together.wait(timeout=10)
        return False

    monkeypatch.setattr(Server, "knows_ranges", False)
    monkeypatch.setattr(Server, "answer", staticmethod(wait))
    shards = [replace(shard, files=(f"{name}.tar",)) for name in "cd"]
    with ThreadPoolExecutor() as threads:
        assert [len(rows) for rows, _ in threads.map(read_rows, shards)] == [16, 16]


def test_whole_files_make_room_for_others(shard, monkeypatch):
    """An open one stays readable."""
    monkeypatch.setattr(Server, "knows_ranges", False)
    monkeypatch.setattr(whole_files, "MAX_KEPT_BYTES", 1)
    kept = whole_files.WholeFiles()
    fs = fsspec.filesystem("http")
    first = kept.open(fs, f"{shard.root}/first.tar")
    second = kept.open(fs, f"{shard.root}/second.tar")
    assert first is not None and second is not None
    assert first.read() == second.read() == CONTENT
    first.close()
    assert len(kept._kept) == 1
    num_gets = Server.num_gets
    again = kept.open(fs, f"{shard.root}/second.tar")
    assert again is not None and again.read() == CONTENT
    assert Server.num_gets == num_gets, "the newest is kept"
    assert first._file is None, "a closed reader takes no room on the disk"
    with pytest.raises(ValueError, match="closed"):
        first.read(1)


def test_signed_urls_of_single_images_are_a_row_each(shard):
    """Both were a folder of one image, and had one name."""
    urls = [f"{shard.root}/{name}.jpg?signature=of/{name}" for name in "ab"]
    shards = list_shards(urls)
    host = shard.root.removeprefix("http://")
    assert [listed.name for listed in shards] == [f"{host}/a.jpg~0-0", f"{host}/b.jpg~0-0"]
    assert [row["image"] for listed in shards for row in read_rows(listed)[0]] == [CONTENT] * 2


def test_tables_of_web_servers_are_read_by_row_groups(shard, monkeypatch):
    """Only the footer and the pages of the row groups that are asked for."""
    rows = [random.randbytes(1 << 18) for _ in range(64)]
    table = pa.BufferOutputStream()
    pq.write_table(
        pa.table({"image": rows}), table, row_group_size=8, compression="none", use_dictionary=False
    )
    content, sent = table.getvalue().to_pybytes(), []
    send = Server.send

    def count(server: Server, status: int, body: bytes, headers: list[tuple[str, str]] | None = None) -> None:
        sent.append(len(body))
        send(server, status, body, headers)

    monkeypatch.setattr(sys.modules[__name__], "CONTENT", content)
    monkeypatch.setattr(Server, "send", count)
    (listed,) = list_shards(f"{shard.root}/0.parquet")
    found, report = read_rows(listed, missing=((60, 64),))
    assert [row["image"] for row in found] == rows[60:]
    assert (report.num_rows, report.complete) == (64, True)
    assert sum(sent) < len(content)


@pytest.mark.parametrize("fault", [slow_down, cut, hang_up])
def test_a_server_that_goes_on_failing_costs_its_shard(shard, monkeypatch, fault):
    monkeypatch.setattr(Server, "answer", always(fault, every=1))
    monkeypatch.setattr(retrying_file, "READ_FOR_S", 0.02)
    rows, report = read_rows(shard)
    assert (rows, report.complete) == ([], False)


@pytest.mark.parametrize("status", [403, 404])
def test_a_definite_answer_is_not_asked_for_again(shard, monkeypatch, status):
    monkeypatch.setattr(Server, "answer", always(lambda server: server.send(status, b""), every=1))
    monkeypatch.setattr(Server, "do_HEAD", Server.do_GET)
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 3600.0)
    rows, report = read_rows(shard)
    assert (rows, report.complete) == ([], False)


def test_each_url_is_read_with_its_own_signature(shard, monkeypatch):
    """The query stood before the name of the file; and a resume gave all files the query of the first."""

    def refuse(server: Server, number: int = 0) -> bool:
        file, _, signature = server.path.strip("/").partition("?")
        if signature == f"signature=of/{file}":
            return False
        server.send(403, b"")
        return True

    answer_head = Server.do_HEAD
    monkeypatch.setattr(Server, "answer", staticmethod(refuse))
    monkeypatch.setattr(Server, "do_HEAD", lambda server: refuse(server) or answer_head(server))
    urls = [f"{shard.root}/{name}?signature=of/{name}" for name in ("a.tar", "b.tar")]
    shards = list_shards(urls)
    assert [listed.name for listed in shards] == ["a.tar", "b.tar"]
    for listed in shards:
        rows, report = read_rows(listed)
        assert (len(rows), report.complete) == (16, True)
    stored = [replace(listed, root=without_secrets(listed.root)) for listed in shards]
    assert list(with_secrets(stored, urls)) == shards
