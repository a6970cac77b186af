"""Other libraries write what the job reads and read what it writes: keys in order, types as documented."""

import io
import json

import datasets
import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from blip2_actor.testing import FakeEngineConfig
from pipeline.inputs.reader import ReadOptions
from pipeline.progress import Console
from pipeline.run.prepare import prepare
from pipeline.run.run_job import run_job
from pipeline.schema import output_schema
from pipeline.settings.job_settings import CaptionSettings
from tests.integration.inputs import png, right_caption

pytestmark = pytest.mark.usefixtures("local_ray")
NUM_ROWS = 30


@pytest.fixture(scope="module")
def output(tmp_path_factory, local_ray) -> str:
    """A tar of the webdataset library and a Parquet file of the datasets library, captioned in one run."""
    root = tmp_path_factory.mktemp("interchange")
    (root / "in").mkdir()
    with webdataset.ShardWriter(f"{root}/in/%03d.tar", maxcount=NUM_ROWS, verbose=0) as tar:
        for n in range(NUM_ROWS):
            tar.write({"__key__": f"sample{n:03d}", "png": png(n), "json": {"n": n}, "txt": f"text {n}"})
    images = [Image.open(io.BytesIO(png(n))) for n in range(NUM_ROWS)]
    table = datasets.Dataset.from_dict(
        {
            "key": [f"row{n:03d}" for n in range(NUM_ROWS)],
            "image": images,
            "txt": [f"text {n}" for n in range(30)],
        },
        features=datasets.Features(
            {"key": datasets.Value("string"), "image": datasets.Image(), "txt": datasets.Value("string")}
        ),
    )
    table.to_parquet(root / "in" / "table.parquet")
    settings = CaptionSettings(
        input=(f"{root}/in/*.tar", f"{root}/in/*.parquet"),
        output=f"{root}/out",
        reading=ReadOptions(keep=("words=txt",)),
    )
    result = run_job(prepare(settings, FakeEngineConfig()), Console(io.StringIO()))
    assert (result.num_rows, result.num_ok) == (2 * NUM_ROWS, 2 * NUM_ROWS)
    return f"{root}/out"


def expected_keys() -> list[str]:
    return [f"sample{n:03d}" for n in range(NUM_ROWS)] + [f"row{n:03d}" for n in range(NUM_ROWS)]


def test_pyarrow_finds_the_contract_and_the_right_captions(output):
    schema = pq.read_schema(f"{output}/000.tar.parquet").remove_metadata()
    assert schema.equals(output_schema([pa.field("words", pa.string())]))
    rows = pq.read_table(f"{output}/000.tar.parquet").to_pylist()
    assert [row["caption"] for row in rows] == [right_caption(png(n)) for n in range(NUM_ROWS)]
    assert [row["words"] for row in rows] == [f"text {n}" for n in range(NUM_ROWS)]
    assert (
        json.loads(pq.read_metadata(f"{output}/000.tar.parquet").metadata[b"blip2.summary"])["num_rows"] == 30
    )


def test_pandas(output):
    frames = [pd.read_parquet(f"{output}/{name}.parquet") for name in ("000.tar", "table.parquet")]
    assert list(pd.concat(frames)["key"]) == expected_keys()


def test_duckdb_reads_all_results_and_no_file_of_the_runs_state(output):
    query = f"select key, status from read_parquet('{output}/**/*.parquet') order by shard, row"
    rows = duckdb.connect().execute(query).fetchall()
    assert [key for key, _ in rows] == expected_keys()


def test_datasets(output):
    loaded = datasets.load_dataset("parquet", data_files=f"{output}/*.parquet", split="train")
    assert loaded["key"][:] == expected_keys()
    assert loaded.features["flags"] == datasets.List(datasets.Value("string"))
