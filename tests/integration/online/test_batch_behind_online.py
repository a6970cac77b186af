"""`blip2 caption --endpoint`: a job that captions with a running endpoint has the rows of any other job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip2_actor import EngineBuilder, EngineConfig
from blip2_actor.testing import FakeEngineConfig
from pipeline.cli.commands import caption
from pipeline.cli.main import main
from pipeline.endpoint.settings import EndpointSettings
from pipeline.inputs.reader import ReadOptions
from pipeline.settings.job_settings import CaptionSettings
from pipeline.settings.outputs import Outputs
from tests.integration.inputs import BROKEN, png
from tests.integration.online.endpoint import engine_stats

NUM_ROWS = 40
MADE = ("pooled", "queries", "likelihood", "fit")
"""The columns of vectors and scores."""


@pytest.fixture
def table(tmp_path: Path) -> str:
    """A table of images with prompts, with a broken image and a prompt that is too long for any model."""
    rows = [{"image": png(n), "ask": f"what is {n}?"} for n in range(NUM_ROWS)]
    rows[5]["image"] = BROKEN
    rows[7]["ask"] = "word " * 3000
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    return str(tmp_path / "in.parquet")


def rows_of(output: Path) -> list[dict[str, Any]]:
    (path,) = output.glob("*.parquet")
    return pq.read_table(path).to_pylist()


def assert_same_rows(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Assert equal rows except for the rounding of numbers, because each step batches other texts."""

    def split(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[float]]:
        """Return the rows with True in place of each number, and the numbers."""
        exact: list[dict[str, Any]] = []
        numbers: list[float] = []
        for row in rows:
            rounded = {name: row[name] for name in row if "logprob" in name or name in MADE}
            for value in rounded.values():
                numbers += np.ravel(value).tolist() if value is not None else []
            exact.append(row | {name: value is not None for name, value in rounded.items()})
        return exact, numbers

    (rows, numbers), (expected_rows, expected_numbers) = split(found), split(expected)
    assert rows == expected_rows
    assert numbers == pytest.approx(expected_numbers, abs=1e-3)


def fingerprint_of(output: Path) -> Any:
    return json.loads((output / "_blip2" / "run.json").read_text())["fingerprint"]


@pytest.mark.parametrize("kind", ["fake", pytest.param("real", marks=pytest.mark.slow)])
def test_the_rows_are_those_of_the_same_job_without_an_endpoint(
    kind: str, url: str, table: str, tmp_path: Path, real_engine: EngineConfig
) -> None:
    """Captions by the prompt of each row, answers, vectors, scores, sizes, flags, statuses and errors."""
    engine: EngineBuilder = FakeEngineConfig(model="demo") if kind == "fake" else real_engine
    route = "" if kind == "fake" else "/real"
    job: dict[str, Any] = {
        "input": (table,),
        "max_failed_fraction": 1.0,
        "reading": ReadOptions(prompt_column="ask", keep=("ask",)),
        "outputs": Outputs(
            ask=("color=Question: what color is it? Answer:",),
            embed=("pooled=vision", "queries=queries"),
            score=("likelihood=caption", "fit=ask"),
            regenerate=True,
        ),
    }
    before = engine_stats(route or "/")
    here, there = tmp_path / "here", tmp_path / "there"
    assert caption(CaptionSettings(**job, output=str(here)), engine) == 0
    serving = EndpointSettings(endpoint=url + route)
    assert caption(CaptionSettings(**job, output=str(there), serving=serving)) == 0
    assert_same_rows(rows_of(there), rows_of(here))
    assert {row["status"] for row in rows_of(there)} >= {"ok", "undecodable"}
    assert all(row[name] is not None for row in rows_of(there) if row["status"] == "ok" for name in MADE)
    assert fingerprint_of(there) == fingerprint_of(here)
    stats = engine_stats(route or "/")
    assert stats.num_requests - before.num_requests >= 2 * (NUM_ROWS - 1)
    # Either way can continue the other's run, and a retry can use either.
    assert caption(CaptionSettings(**job, output=str(there)), engine) == 0
    assert main(["retry", str(here), "--endpoint", url + route]) == 0
    assert_same_rows(rows_of(here), rows_of(there))


def test_batch_work_and_a_caller_share_the_engine(url: str, table: str, tmp_path: Path) -> None:
    """The caller and the job share one application; the caller gets the caption that the job writes."""
    serving = EndpointSettings(endpoint=url)
    assert caption(CaptionSettings(input=(table,), output=str(tmp_path / "out"), serving=serving)) == 2
    answer = httpx.post(f"{url}/v1/caption", files={"image": png(3)}, timeout=30).json()
    assert answer["caption"] == rows_of(tmp_path / "out")[3]["caption"]
