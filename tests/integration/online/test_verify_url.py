"""`blip2 verify --url`: the endpoint must repeat the captions of an output; a difference is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip2_actor.testing import FakeEngineConfig
from pipeline.cli.main import main
from pipeline.inputs.reader import PROMPT, ReadOptions
from pipeline.inputs.stamps import read_unchanged
from pipeline.run.prepare import prepare
from pipeline.schema import ROW_CONTRACT
from pipeline.settings.job_settings import CaptionSettings
from tests.integration.online.endpoint import caption_of, png
from tests.ports import free_port
from tests.unit.inputs.formats.reading_cases import tar_bytes

NUM_ROWS = 20


def write_run(root: Path, **settings: Any) -> Path:
    """Write a finished run of a tar with the captions of the fake engine, and return its output."""
    members = [
        (f"{n:02}.{kind}", png(n) if kind == "png" else b"a %d" % n)
        for n in range(NUM_ROWS)
        for kind in ("png", "txt")
    ]
    (root / "in.tar").write_bytes(tar_bytes(members))
    values = {"input": (str(root / "in.tar"),), "output": str(root / "out")} | settings
    job = prepare(CaptionSettings(**values), FakeEngineConfig(model="demo"))
    job.ledger.begin(job.run)
    (shard,) = job.ledger.unfinished(job.run, job.ledger.scan())
    reader = read_unchanged(shard.work, job.settings.read_options)
    try:
        while True:
            rows = [_captioned(row, job.settings.prompt) for row in next(reader).to_pylist()]
            job.ledger.write_fragment(pa.Table.from_pylist(rows, schema=ROW_CONTRACT))
    except StopIteration as end:
        job.ledger.commit(end.value, job.metadata, job.empty_schema)
    return root / "out"


def _captioned(row: dict[str, Any], prompt: str | None) -> dict[str, Any]:
    from hashlib import sha256

    caption = caption_of(row["image"], row.get(PROMPT, prompt))
    named = {name: row[name] for name in ("key", "shard", "row", "member")}
    made = {"caption": caption, "num_tokens": 3, "finish_reason": "stop", "flags": [], "status": "ok"}
    return named | made | {"sha256": sha256(row["image"]).digest()}


def verified(
    output: Path, url: str, capsys: pytest.CaptureFixture[str], *flags: str
) -> tuple[int, list[dict]]:
    status = main(["verify", "--output", str(output), "--url", url, "--json", *flags])
    return status, json.loads(capsys.readouterr().out)["findings"]


@pytest.mark.parametrize(
    "settings", [{"prompt": "a photo of"}, {"reading": ReadOptions(prompt_column="txt")}, {}]
)
def test_the_endpoint_gives_the_captions_of_the_output(tmp_path, url, settings, capsys):
    status, findings = verified(write_run(tmp_path, **settings), url, capsys)
    assert (status, [finding["found"] for finding in findings]) == (
        0,
        [f"16 of 16 captions are those of {url}"],
    )


def test_another_caption_and_another_image_are_told_by_their_rows(tmp_path, url, capsys):
    output = write_run(tmp_path)
    (path,) = output.glob("*.parquet")
    footer = {k: v for k, v in pq.read_metadata(path).metadata.items() if k != b"ARROW:schema"}
    rows = pq.read_table(path).to_pylist()
    rows[3]["caption"] = "another caption"
    rows[5]["sha256"] = b"another image"
    changed = pa.Table.from_pylist(rows, schema=ROW_CONTRACT.with_metadata(footer))
    pq.write_table(changed, path)
    status, (other, gone, said) = verified(output, url, capsys, "--sample", "100")
    assert (status, other["verdict"], other["subject"]) == (1, "fail", "in.tar row 3 (03)")
    assert other["found"].startswith("caption is 'another caption', and http://")
    assert (gone["subject"], gone["verdict"]) == ("in.tar row 5 (05)", "warn")
    assert said["found"].startswith("18 of 19 captions are those of ")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "model of the run, got {url}/real with digest "),
        ({"prompt": "a photo of"}, "{nowhere} gives no answer: "),
    ],
)
def test_an_endpoint_that_cannot_be_compared_is_refused_before_work(tmp_path, url, settings, said, capsys):
    output = write_run(tmp_path, **settings)
    nowhere = f"http://127.0.0.1:{free_port()}"
    given = f"{url}/real" if "{url}" in said else nowhere
    assert main(["verify", "--output", str(output), "--url", given]) == 3
    assert said.format(url=url, nowhere=nowhere) in capsys.readouterr().err
    assert main(["verify", "--output", str(output), "--url", "127.0.0.1"]) == 3
    assert "--url must begin with http:// or https://, got 127.0.0.1" in capsys.readouterr().err
