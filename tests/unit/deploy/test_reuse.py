"""Equal requests are computed once: while running, from memory, and from the files of a finished run."""

from __future__ import annotations

import asyncio
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip2_actor import DecodedImage, GenerationOptions, ImageLimits
from blip2_actor.testing import FakeEngineConfig
from deploy.command import main
from deploy.observe import metrics
from deploy.reuse import finished_run
from deploy.reuse.finished_run import FinishedRun
from deploy.reuse.made import Made
from deploy.reuse.shared_work import SharedWork
from deploy.work import ImageOutputs, ImageWork
from tests.engines import cpu_config
from tests.unit.deploy.routes.engine_service import EngineService, ask, caption_of, png

STORED_RUN = Path(__file__).parents[2] / "fixtures" / "stored_run"
DEMO = cpu_config("demo")


def made(name: str) -> Made:
    return Made.of(name, DecodedImage(width=1, height=1), ImageOutputs())


SIZE = made("a").num_bytes


class Work:
    """Work that ends when the test says so."""

    def __init__(self) -> None:
        self.num_begun = self.num_cancelled = 0
        self.may_end = asyncio.Event()
        self.failure: Exception | None = None

    async def make(self) -> Made:
        self.num_begun += 1
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.failure is not None:
            raise self.failure
        return made("a")


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_equal_requests_under_way_are_made_once_and_then_kept() -> None:
    work, shared = Work(), SharedWork(max_bytes=10 * SIZE)
    callers = [asyncio.create_task(shared.get("key", work.make)) for _ in range(32)]
    await settle()
    work.may_end.set()
    answers = await asyncio.gather(*callers)
    assert len({id(answer) for answer in answers}) == work.num_begun == 1
    assert await shared.get("key", work.make) is answers[0]
    await shared.get("other", work.make)
    assert work.num_begun == 2


async def test_work_ends_when_its_last_caller_has_left_and_not_before() -> None:
    """Otherwise one client that disconnects takes away the answer of all others."""
    work, shared = Work(), SharedWork(max_bytes=10 * SIZE)
    first, second = (asyncio.create_task(shared.get("key", work.make)) for _ in range(2))
    await settle()
    first.cancel()
    await settle()
    assert not work.num_cancelled
    second.cancel()
    await settle()
    assert work.num_cancelled == 1
    work.may_end.set()
    assert (await shared.get("key", work.make)).sha256 == "a"
    assert work.num_begun == 2


async def test_work_that_fails_while_it_is_cancelled_leaves_its_successor_alone() -> None:
    work, shared = Work(), SharedWork(max_bytes=10 * SIZE)
    may_fail = asyncio.Event()

    async def fail_late() -> Made:
        try:
            await asyncio.Event().wait()
        finally:
            await may_fail.wait()
            raise ValueError("the wait was cut")

    left = asyncio.create_task(shared.get("key", fail_late))
    await settle()
    left.cancel()
    await settle()
    callers = [asyncio.create_task(shared.get("key", work.make))]
    await settle()
    may_fail.set()
    await settle()
    callers.append(asyncio.create_task(shared.get("key", work.make)))
    await settle()
    work.may_end.set()
    first, second = await asyncio.gather(*callers)
    assert first is second and work.num_begun == 1


async def test_a_failure_is_told_to_all_who_wait_and_to_nobody_later() -> None:
    work, shared = Work(), SharedWork(max_bytes=10 * SIZE)
    work.failure = ValueError("the engine is gone")
    callers = [asyncio.create_task(shared.get("key", work.make)) for _ in range(3)]
    await settle()
    work.may_end.set()
    assert await asyncio.gather(*callers, return_exceptions=True) == [work.failure] * 3
    work.failure = None
    assert (await shared.get("key", work.make)).sha256 == "a"


@pytest.mark.parametrize(("max_bytes", "num_begun"), [(0, 6), (2 * SIZE, 4), (3 * SIZE, 3)])
async def test_memory_is_bounded_and_what_was_used_last_stays(max_bytes: int, num_begun: int) -> None:
    work, shared = Work(), SharedWork(max_bytes)
    work.may_end.set()
    for key in ("a", "b", "a", "c", "a", "b"):
        await shared.get(key, work.make)
    assert work.num_begun == num_begun
    assert shared._num_bytes <= max_bytes


def test_equal_requests_are_encoded_once_over_http() -> None:
    service = EngineService(FakeEngineConfig(model="demo"))
    service._shared_work = SharedWork(max_bytes=1 << 20)
    query = {"choices": '["a", "b"]', "embed": '["qformer"]'}
    answers = [ask(service, "POST", "/v1/caption", content=png(), params=query).json() for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    assert service.captioner.stats().num_images_encoded == 1
    other = ask(service, "POST", "/v1/caption", content=png(), params={"max_new_tokens": "5"})
    assert other.json()["caption"] == caption_of(png())
    assert service.captioner.stats().num_images_encoded == 2


# A finished run ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> Iterator[EngineService]:
    made = EngineService(DEMO, GenerationOptions())
    yield made
    made.captioner._actor.close()


def pictures() -> list[bytes]:
    with tarfile.open(STORED_RUN / "input" / "scenes-0.tar") as tar:
        members = [member for member in tar if member.name.endswith(".png")]
        return [tar.extractfile(member).read() for member in members]  # type: ignore[union-attr]


def run_of(demo: EngineService, folder: Path = STORED_RUN / "finished") -> FinishedRun:
    found = FinishedRun(str(folder), demo.first.info, ImageLimits())
    found.read_index()
    return found


def test_a_finished_run_answers_as_the_engine_does(demo: EngineService) -> None:
    image = pictures()[0]
    from_engine = ask(demo, "POST", "/v1/caption", content=image).json()
    num_encoded = demo.captioner.stats().num_images_encoded
    demo._finished_run = run_of(demo)
    try:
        from_run = ask(demo, "POST", "/v1/caption", content=image).json()
        assert demo.captioner.stats().num_images_encoded == num_encoded
        changed = ask(demo, "POST", "/v1/caption", content=image, params={"prompt": "a photo of"})
        elsewhere = ask(demo, "POST", "/v1/caption", content=png(7))
    finally:
        demo._finished_run = None
    assert from_run["token_ids"] is None and from_engine["token_ids"]
    assert from_run.pop("logprob") == pytest.approx(from_engine.pop("logprob"), abs=1e-5)
    del from_run["token_ids"], from_engine["token_ids"]
    assert from_run == from_engine
    assert changed.json()["fingerprint"] != from_run["fingerprint"]
    assert elsewhere.status_code == 200
    assert demo.captioner.stats().num_images_encoded == num_encoded + 2


def look_up(run: FinishedRun, row: dict[str, Any]) -> str | None:
    """Return the caption in the run for the image of a row."""
    made = asyncio.run(run.look_up(row["sha256"].hex(), run.work))
    return None if made is None else made.outputs.texts[0].text


def test_every_row_of_a_run_is_found(demo: EngineService) -> None:
    run = run_of(demo)
    rows = [row for path in sorted((STORED_RUN / "finished").glob("*.parquet")) for row in rows_of(path)]
    made = [row for row in rows if row["status"] == "ok"]
    assert [look_up(run, row) for row in made] == [row["caption"] for row in made]
    failed = [row for row in rows if row["status"] != "ok" and row["sha256"]]
    assert failed and not any(look_up(run, row) for row in failed)


@pytest.mark.parametrize(
    ("part", "name", "value", "what"),
    [
        (None, "model", "another", "model"),
        (None, "dtype", "float16", "dtype"),
        (None, "quantize", "int8", "quantize"),
        ("image", "size_px", 8, "image size"),
        ("image", "jpeg_draft", True, "image_jpeg_draft"),
        ("image", "accept_truncated", True, "image_accept_truncated"),
        ("columns", "prompt", "question", "prompt column"),
        ("outputs", "regenerate", True, "regenerate"),
        ("outputs", "columns", ["vector"], "captions"),
    ],
)
def test_a_run_that_was_made_otherwise_is_refused(
    demo: EngineService, tmp_path: Path, part: str | None, name: str, value: Any, what: str
) -> None:
    """Its captions are not those of the service, or it has none."""
    table = pq.read_table(next((STORED_RUN / "finished").glob("*.parquet")))
    run = json.loads(table.schema.metadata[finished_run.RUN_KEY])
    (run if part is None else run[part])[name] = value
    metadata = {finished_run.RUN_KEY: json.dumps(run).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "0.parquet")
    with pytest.raises(ValueError, match=f"cache_from must be a run with the {what} of the service"):
        run_of(demo, tmp_path)


def test_a_row_group_is_read_once_and_few_are_kept(
    demo: EngineService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each hit used to open its file again; if every group were kept, memory would hold the whole run."""
    for path in (STORED_RUN / "finished").glob("*.parquet"):
        pq.write_table(pq.read_table(path), tmp_path / path.name, row_group_size=2)
    monkeypatch.setattr(finished_run, "KEPT_ROW_GROUPS", 2)
    run = run_of(demo, tmp_path)
    opened: list[str] = []
    open_file = run._open

    def open_and_note(path: str) -> pq.ParquetFile:
        opened.append(path)
        return open_file(path)

    monkeypatch.setattr(run, "_open", open_and_note)
    path = sorted(tmp_path.glob("*.parquet"))[0]
    rows = [row for row in rows_of(path) if row["status"] == "ok"]
    assert len(rows) == 6
    for _ in range(3):
        for row in rows[:2]:
            assert look_up(run, row) == row["caption"]
    assert 1 <= len(opened) <= 2
    for row in rows:
        assert look_up(run, row) == row["caption"]
    assert run._row_group.cache_info().currsize == 2


@pytest.mark.parametrize("failure", [OSError("no network"), pa.ArrowInvalid("not Parquet"), None])
def test_a_run_that_cannot_be_read_leaves_the_image_to_the_engine(
    demo: EngineService,
    failure: Exception | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """While the store was away, requests used to get a 500 or no answer, although engines were available."""
    counted: list[str] = []
    monkeypatch.setattr(metrics.CACHE_REQUESTS, "inc", lambda _, tags: counted.append(tags["result"]))
    monkeypatch.setattr(finished_run, "READ_WITHIN_S", 0.05)
    may_end = threading.Event()

    def fail(*_: Any) -> Any:
        if failure is None:
            may_end.wait()
        else:
            raise failure

    run = run_of(demo)
    monkeypatch.setattr(run, "_row_group", fail)
    monkeypatch.setattr(demo, "_finished_run", run)
    try:
        answers = [ask(demo, "POST", "/v1/caption", content=pictures()[0]) for _ in range(3)]
    finally:
        may_end.set()
    assert [answer.status_code for answer in answers] == [200] * 3 and answers[0].json()["token_ids"]
    assert counted.count("run_failed") == 3
    assert caplog.text.count("cannot be read") == 1


def test_a_store_that_hangs_delays_nothing_that_the_run_does_not_have(
    demo: EngineService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four images of the run used to take all threads, and other requests waited until they timed out."""
    counted: list[str] = []
    monkeypatch.setattr(metrics.CACHE_REQUESTS, "inc", lambda _, tags: counted.append(tags["result"]))
    may_end = threading.Event()
    run = run_of(demo)
    monkeypatch.setattr(run, "_row_group", lambda *_: may_end.wait())
    [kept, *_] = (row for row in rows_of(next((STORED_RUN / "finished").glob("*.parquet"))) if row["caption"])

    async def ask_run() -> None:
        of_run = [
            asyncio.create_task(run.look_up(kept["sha256"].hex(), run.work))
            for _ in range(finished_run.NUM_THREADS)
        ]
        await settle()
        monkeypatch.setattr(finished_run, "READ_WITHIN_S", 0.05)
        assert await run.look_up("ff" * 32, run.work) is None
        assert await run.look_up(kept["sha256"].hex(), ImageWork(features=True)) is None
        assert not counted
        for task in of_run:
            task.cancel()

    try:
        asyncio.run(ask_run())
    finally:
        may_end.set()


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path, columns=["caption", "status", "sha256"]).to_pylist()
    return rows


def test_a_run_of_other_settings_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished, exact = str(STORED_RUN / "finished"), ["--dtype", "float32"]
    (tmp_path / "empty").mkdir()
    for flags, said in (
        (["--cache-from", str(tmp_path / "empty")], "which has no rows"),
        (["--cache-from", str(tmp_path / "nothing")], "nothing, which has no rows"),
        (
            ["--cache-from", finished, *exact, "--image-jpeg-draft"],
            "image_jpeg_draft of the service (True)",
        ),
        (["--cache-from", finished, "--dtype", "bfloat16"], "dtype of the service (bfloat16)"),
        (["--cache-from", finished, *exact, "--quantize", "int8"], "quantize of the service (int8)"),
    ):
        assert main(["--model", "demo", "--device", "cpu", "--port", "18999", *flags]) == 3
        assert said in capsys.readouterr().err
