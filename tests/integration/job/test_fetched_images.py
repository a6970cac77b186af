"""A job whose rows hold image addresses: the decoding actors load them, and a failure costs one row."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip2_actor.testing import FakeEngineConfig
from pipeline.export.export import export
from pipeline.fetching.fetch_settings import FetchSettings
from pipeline.inputs.reader import ReadOptions
from pipeline.progress import Console
from pipeline.run.prepare import prepare, prepare_retry
from pipeline.run.run_job import run_job
from pipeline.settings.job_settings import CaptionSettings
from pipeline.settings.report_settings import ExportSettings
from pipeline.settings.retry_settings import RetrySettings
from tests.integration.inputs import BROKEN, png, right_caption
from tests.unit.fetching.web_server import Answer, web_server

pytestmark = pytest.mark.usefixtures("local_ray")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "out" / "urls.parquet.parquet").to_pylist()


def test_a_column_of_urls_is_captioned_and_a_retry_fetches_again_what_has_failed(tmp_path: Path) -> None:
    answers: dict[str, Sequence[Answer]] = {
        "/0": [png(0)],
        "/1": [429, png(1)],
        "/2": [404, png(2)],
        "/3": [BROKEN],
        "/4": [(302, {"Location": "http://169.254.169.254/latest"})],
    }
    with web_server(answers) as site:
        urls = [site.url + path for path in answers]
        pq.write_table(pa.table({"url": urls, "key": list("abcde")}), tmp_path / "urls.parquet")
        (tmp_path / "5.png").write_bytes(png(5))
        (tmp_path / "list.csv").write_text(f"url\n5.png\n{site.url}/0\n")
        settings = CaptionSettings(
            input=(str(tmp_path / "urls.parquet"), f"@{tmp_path / 'list.csv'}"),
            output=str(tmp_path / "out"),
            reading=ReadOptions(image_column="url", fetch=True),
            fetching=FetchSettings(allow_private_hosts=("127.0.0.1",)),
            max_failed_fraction=1.0,
        )
        run_job(prepare(settings, FakeEngineConfig()), Console(io.StringIO()))
        rows = rows_of(tmp_path)
        assert [row["key"] for row in rows] == list("abcde")
        assert [row["status"] for row in rows] == ["ok", "ok", "fetch_failed", "undecodable", "refused"]
        assert [row["caption"] for row in rows[:2]] == [right_caption(png(0)), right_caption(png(1))]
        assert "status 404" in rows[2]["error"] and "public address" in rows[4]["error"]
        assert site.num_requests["/2"] == 1
        listed = pq.read_table(tmp_path / "out" / "list.csv~0-1.parquet").to_pylist()
        assert [row["caption"] for row in listed] == [right_caption(png(5)), right_caption(png(0))]

        retry = RetrySettings(output=str(tmp_path / "out"))
        result = run_job(prepare_retry(retry, FakeEngineConfig()), Console(io.StringIO()))
        assert result.by_status == {"ok": 5, "undecodable": 1, "refused": 1}
        assert rows_of(tmp_path)[2]["caption"] == right_caption(png(2))
        assert site.num_requests["/0"] == 2, "a finished row is not fetched again"


def test_an_export_asks_the_private_hosts_that_a_retry_has_allowed(tmp_path: Path) -> None:
    with web_server({"/0": [png(0)]}) as site:
        pq.write_table(pa.table({"url": [f"{site.url}/0"]}), tmp_path / "urls.parquet")
        output = str(tmp_path / "out")
        settings = CaptionSettings(
            input=(str(tmp_path / "urls.parquet"),), output=output, reading=ReadOptions(fetch=True)
        )
        run_job(prepare(settings, FakeEngineConfig()), Console(io.StringIO()))
        (row,) = rows_of(tmp_path)
        assert row["status"] == "refused"
        assert "give --allow-private-hosts to the job or to blip2 retry" in row["error"]
        retry = RetrySettings(output=output, allow_private_hosts=("127.0.0.1",))
        assert run_job(prepare_retry(retry, FakeEngineConfig()), Console(io.StringIO())).num_ok == 1
        assert export(ExportSettings(output=output, to="imagefolder", into=str(tmp_path / "new"))) == 0
        (image,) = (tmp_path / "new").rglob("*.png")
        assert image.read_bytes() == png(0)
        again = prepare_retry(RetrySettings(output=output), FakeEngineConfig())
        assert again.settings.fetching.allow_private_hosts == ("127.0.0.1",)
        assert not prepare(settings, FakeEngineConfig()).is_revised
