"""A second model on trial: who gets it, what is copied to it, and what is recorded about both."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip2_actor import EngineConfig, GenerationOptions
from blip2_actor.testing import FakeEngineConfig
from deploy.captioner import Captioner
from deploy.observe.request_record import RECORD, AccessLog
from deploy.settings import Settings
from deploy.trials import recording
from deploy.trials import trials as trials_module
from deploy.trials.share import Share
from deploy.trials.trials import Trials
from pipeline.cli.main import main
from pipeline.schema import ROW_CONTRACT
from tests.unit.deploy.routes.engine_service import EngineService, caption_of, png

NUM = 40
REFUSED = png(NUM - 1)


class Second(Captioner):
    """The captioner of the model on trial, as a gateway sees it."""

    def __init__(self, **engine: Any) -> None:
        super().__init__(
            FakeEngineConfig(model="folder", refuses_on=(caption_of(REFUSED),), **engine), GenerationOptions()
        )

    async def info(self) -> Any:  # type: ignore[override]
        return self._actor.info


class Service(EngineService):
    def __init__(self, second: Captioner, **settings: Any) -> None:
        super().__init__()
        self.second, self.is_busy = second, False
        self._models._others = {"second": second}  # type: ignore[dict-item]
        given = Settings(engine=EngineConfig(model="demo"), other_models=("second=folder",), **settings)
        self._trials = Trials(given, self._models, lambda: self.is_busy)

    async def settle(self) -> None:
        """Wait for the copies in progress."""
        while copies := self._trials._copies:
            await asyncio.wait(copies)


@asynccontextmanager
async def client_of(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(AccessLog(service.api), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def ask(service: Service, num: int = NUM, **more: Any) -> list[httpx.Response]:
    """Caption different images one after another, each with its own id."""

    async def run() -> list[httpx.Response]:
        async with client_of(service) as client:
            await service._models.get("second")
            answers = [
                await client.post("/v1/caption", content=png(n), headers={"x-request-id": f"id-{n}"}, **more)
                for n in range(num)
            ]
            await service.settle()
            return answers

    return asyncio.run(run())


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> Second:
    monkeypatch.setattr(trials_module, "MAX_COPIES", NUM)  # on a busy machine, copies lag behind
    return Second()


def test_a_share_of_the_requests_is_answered_by_the_second_model(second: Second, tmp_path: Path) -> None:
    service = Service(second, ab_test="second=0.3", trial_record=str(tmp_path))
    answers = ask(service, NUM - 1)
    models = [answer.json()["model"] for answer in answers]
    assert [answer.json()["model"] for answer in ask(service, NUM - 1)] == models, "an id keeps its model"
    assert set(models) == {"demo", "second"} and 4 <= models.count("second") <= 20
    by_name = ask(service, 5, params={"model": "demo"})
    assert {answer.json()["model"] for answer in by_name} == {"demo"}
    service._trials.close()
    recorded = {side: rows_of(tmp_path / "ab_test" / side) for side in ("A", "B")}
    assert {row["model"] for row in recorded["A"]} == {"demo"}
    assert len(recorded["A"]) == 2 * models.count("demo"), "who names a model is no random share"
    assert len(recorded["B"]) == 2 * models.count("second")
    assert {row["model"] for row in recorded["B"]} == {"second"}


def test_the_second_model_starts_with_the_first_request_of_its_share(second: Second) -> None:
    """The first model answers until the second one runs."""
    service = Service(second, ab_test="second=1")

    async def run() -> list[str]:
        models = []
        async with client_of(service) as client:
            for n in range(2):
                answer = await client.post("/v1/caption", content=png(n))
                models.append(answer.json()["model"])
                await asyncio.gather(*service._models._asking.values())
        return models

    assert asyncio.run(run()) == ["demo", "second"]


def test_streams_of_an_ab_test_are_recorded_as_other_answers_are(second: Second, tmp_path: Path) -> None:
    recorded = []
    for stream in ("false", "true"):
        folder = tmp_path / stream
        service = Service(second, ab_test="second=0.5", trial_record=str(folder))
        assert {answer.status_code for answer in ask(service, 8, params={"stream": stream})} == {200}
        service._trials.close()
        recorded.append([rows_of(folder / "ab_test" / side) for side in ("A", "B")])
    assert recorded[0] == recorded[1] and all(recorded[0])


def test_without_an_engine_of_the_second_model_the_first_answers(
    second: Second, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(second, ab_test="second=1")

    async def never() -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(second, "info", never)

    async def run() -> str:
        async with client_of(service) as client:
            return str((await client.post("/v1/caption", content=png(0))).json()["model"])

    assert asyncio.run(run()) == "demo"


def test_what_the_shadow_says_is_recorded_and_compared(
    second: Second, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service = Service(second, shadow="second=1", trial_record=str(tmp_path))
    answers = ask(service, params={"prompt": "a secret"})
    assert {answer.json()["model"] for answer in answers} == {"demo"}
    assert second.stats().num_requests == NUM
    service._trials.close()
    first, copies = (rows_of(tmp_path / "shadow" / side) for side in ("A", "B"))
    assert len(first) == len(copies) == NUM
    assert {row["prompt"] for row in first + copies} == {None}, "prompts are not written unless asked for"
    assert not list(tmp_path.rglob("*.tmp"))
    for row, answer in zip(first, answers, strict=True):
        assert (row["caption"], row["logprob"]) == (answer.json()["caption"], answer.json()["logprob"])
        assert row["sha256"].hex() == answer.json()["sha256"]
    folders = [str(tmp_path / "shadow" / side) for side in ("A", "B")]
    assert main(["compare", *folders, "--json", "--html", str(tmp_path / "page.html")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["matched"], found["captioned"], found["changed"]) == (NUM, NUM, 0)
    assert found["unmatched"] == {}


def test_a_shadow_that_refuses_is_a_changed_status(
    second: Second, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service = Service(second, shadow="second=1", trial_record=str(tmp_path), trial_prompts=True)
    assert {answer.status_code for answer in ask(service)} == {200}
    service._trials.close()
    assert main(["compare", *(str(tmp_path / "shadow" / side) for side in ("A", "B")), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status_changes"] == [["ok", "refused", 1]]


def test_a_shadow_never_slows_or_fails_a_caller(second: Second, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second model hangs, then fails; the caller does not notice, and only a few copies wait."""
    service = Service(second, shadow="second=1")
    monkeypatch.setattr(trials_module, "MAX_COPIES", 3)
    gate = asyncio.Event()
    counted: list[str] = []
    monkeypatch.setattr(trials_module.SHADOW_REQUESTS, "inc", lambda _, tags: counted.append(tags["result"]))

    async def hang(*_: Any) -> Any:
        await gate.wait()
        raise RuntimeError("the engine is gone")
        yield

    monkeypatch.setattr(second, "run_batch", hang)

    async def run() -> list[int]:
        async with client_of(service) as client:
            answers = [await client.post("/v1/caption", content=png(n)) for n in range(8)]
            assert len(service._trials._copies) == 3 and counted == ["dropped"] * 5
            gate.set()
            await service.settle()
            service.is_busy = True
            answers.append(await client.post("/v1/caption", content=png(9)))
            return [answer.status_code for answer in answers]

    assert asyncio.run(run()) == [200] * 9
    assert counted == ["dropped"] * 5 + ["failed"] * 3 + ["dropped"]


def test_records_are_bounded_and_a_disk_that_fails_is_no_error(
    second: Second, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "ROWS_PER_FILE", 4)
    monkeypatch.setattr(recording, "MAX_ROWS", 10)
    service = Service(second, shadow="second=1", trial_record=str(tmp_path / "a"))
    assert {answer.status_code for answer in ask(service, 20)} == {200}
    service._trials.close()
    sizes = [pq.read_metadata(path).num_rows for path in (tmp_path / "a").rglob("*.parquet")]
    assert sum(sizes) == 10 and max(sizes) <= 4
    blocked = tmp_path / "file"
    blocked.touch()
    service = Service(second, shadow="second=1", trial_record=str(blocked))
    assert {answer.status_code for answer in ask(service, 20)} == {200}
    service._trials.close()


def test_outside_of_a_request_nothing_is_in_an_ab_test(second: Second) -> None:
    """A shared record takes what is noted there, and used to keep the mark for good."""
    service = Service(second, ab_test="second=1")
    assert service._trials.choose(service.first) is service.first
    assert not RECORD.get().is_in_ab_test


def test_without_rows_no_number_of_a_file_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MAX_AGE_S", -1)
    recorder = recording.Recorder(str(tmp_path), with_prompts=False)
    for _ in range(3):
        recorder.write_if_due()
    recorder.close()
    assert recorder._num_written == 0 and not list(tmp_path.iterdir())


def test_recorded_rows_keep_the_row_contract() -> None:
    """Another part of the project reads this Parquet by names and types."""
    for field in recording.SCHEMA:
        if field.name not in ("model", "prompt"):
            assert ROW_CONTRACT.field(field.name) == field


@pytest.mark.parametrize("given", ["second", "third=0.5", "second=0", "second=1.5", "second=x", "second=nan"])
def test_a_share_that_cannot_be_is_refused(given: str) -> None:
    for name in ("ab_test", "shadow"):
        with pytest.raises(ValueError, match=f"{name} must be NAME=SHARE"):
            Settings(other_models=("second=folder",), **{name: given})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shadow must be NAME=SHARE"):
        Settings(other_models=("second=folder",), ab_test="second=0.5", shadow=given)
    with pytest.raises(ValueError, match="trial_record must be left out"):
        Settings(trial_record="folder")


def test_the_two_trials_choose_independently() -> None:
    ids = [f"id-{n}" for n in range(2_000)]
    ab_test, shadow = (Share.parse(kind, "b=0.25", ["b"]) for kind in ("ab_test", "shadow"))
    both = sum(ab_test.has(one) and shadow.has(one) for one in ids)
    assert 400 < sum(map(ab_test.has, ids)) < 600 and 80 < both < 170


def test_plain_files_without_the_columns_of_a_run_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pq.write_table(pa.table({"key": ["x"]}), tmp_path / name / "rows.parquet")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 3
    assert "rows.parquet has no shard, row, sha256, caption" in capsys.readouterr().err
