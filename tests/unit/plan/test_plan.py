"""`blip2 plan` on inputs of known size, with engines of known cost."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from blip2_actor import EngineConfig, QuantizationChoice
from blip2_actor.demo.scenes import SceneSampler, draw
from blip2_actor.quantization import int8
from blip2_actor.quantization import quantize as quantizing
from blip2_actor.quantization.choice import PARTS
from blip2_actor.testing import FakeEngineConfig, captions_made, save_tiny_retrieval_checkpoint
from pipeline.attempts.attempt import Attempt
from pipeline.attempts.store import write_attempt
from pipeline.cli.main import main
from pipeline.inputs import size_estimate
from pipeline.inputs.listing import list_shards
from pipeline.inputs.reader import ReadOptions
from pipeline.inputs.shards import Shard
from pipeline.inputs.size_estimate import estimate_size
from pipeline.ledger.scan import scan_output
from pipeline.plan import cost, sample, stage_costs
from pipeline.plan.cost import Cost
from pipeline.plan.make_plan import make_plan
from pipeline.plan.model import MAX_ERRORS_SHOWN, RAY_START_S
from pipeline.plan.plan import plan
from pipeline.plan.prediction import predict
from pipeline.plan.quantization import QuantizationEffect, tensor_bytes
from pipeline.plan.sample import take_sample
from pipeline.progress import format_bytes
from pipeline.settings import deadline as deadline_module
from pipeline.settings.outputs import Outputs
from pipeline.settings.placement import Placement
from pipeline.settings.plan_settings import PlanEmbedSettings, PlanScoreSettings, PlanSettings
from pipeline.stages.caption import CaptionStage
from pipeline.stages.engine_fault import EngineFault
from pipeline.storage.folder import Folder
from tests.integration.inputs import BROKEN, png, write_tar, write_tars

SLACK = 2.5
"""Factor by which a measured time may be too long, because the machine does other work too."""


KEYS_OF_JSON = {
    "input": {"num_shards", "num_bytes", "num_rows", "least_rows", "most_rows", "is_counted"},
    "prediction": {"stages", "actor_s", "cpus_per_actor", "here_s", "bottleneck"},
}
"""Keys that programs may have read since version 0.1.0."""


@pytest.fixture(autouse=True)
def _short_passes(monkeypatch):
    monkeypatch.setattr(stage_costs, "MIN_S", 0.1)


def settings(folder: Path, **changes) -> PlanSettings:
    return PlanSettings(**{"input": (str(folder),)} | changes)


def test_the_prediction_is_what_the_engine_costs(tmp_path):
    """Counting the start-up, the first batch or the failed rows would make it several times too long."""
    write_tars(tmp_path / "in", num_tars=4, rows_per_tar=50)
    found = make_plan(settings(tmp_path / "in"), FakeEngineConfig(seconds_per_image=0.005))
    prediction = found.prediction
    assert found.size_estimate.num_rows == 200
    assert 1.0 <= prediction.actor_s <= 1.0 * SLACK
    assert prediction.here_s == pytest.approx(found.start_s + prediction.actor_s)
    assert found.start_s > RAY_START_S
    assert "of it start-up; bottleneck: caption; a faster device or more machines would help" in "\n".join(
        found.lines()
    )
    assert (prediction.bottleneck, prediction.stages["caption"].workers_per_actor) == ("caption", 1)
    assert len(found.sample.shards) == 4


def test_the_start_is_as_long_as_the_last_one_of_this_output(tmp_path):
    """The plan used to assume ten seconds plus the model's load, even if nodes take minutes to start."""
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=4)
    info = FakeEngineConfig().info()
    output = Folder(str(tmp_path / "out"))

    def attempt(minute: int, **changes: Any) -> None:
        values = {"model": info.model, "dtype": info.dtype, "phases": {"start Ray": 1.0}} | changes
        begun = f"2026-01-31T18:{minute:02}:00+00:00"
        write_attempt(output, Attempt(id=f"{minute:08}", run="r", begun=begun, **values))

    attempt(1, ready_s=None)  # it never had a worker
    attempt(2, ready_s=200.0)
    attempt(3, ready_s=300.0)
    attempt(4, ready_s=400.0, model="another")
    found = make_plan(settings(tmp_path / "in", output=str(output)), FakeEngineConfig())
    assert found.start_s == 300.0
    assert "5 min of it start-up, as in the last run of this output;" in "\n".join(found.lines())


def test_a_fast_engine_is_limited_by_decoding(tmp_path):
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (500, 500, 3), np.uint8)).save(noise, "PNG")
    write_tar(tmp_path / "in" / "0.tar", {f"{n}": noise.getvalue() for n in range(8)})
    found = make_plan(settings(tmp_path / "in"), FakeEngineConfig(image_size_px=8))
    assert found.prediction.bottleneck == "decode"
    assert found.prediction.decode_workers_per_actor > 1


def test_workers_hours_and_bottleneck_by_arithmetic():
    costs = {
        "read": Cost(0.001, 0.0005),
        "decode": Cost(0.010, 0.010),
        "caption": Cost(0.002, 0.001),
        "write": Cost(0.0001, 0.0001),
    }
    found = predict(costs, 1_000_000, num_cpus=2, placement=Placement())
    assert found.decode_workers_per_actor == 5
    assert found.cpus_per_actor == pytest.approx(5.8)
    assert found.actor_s == pytest.approx(2000)
    # Two cores share 11.6 ms of work per row.
    assert found.here_s == pytest.approx(5800)
    assert found.bottleneck == "decode"
    many_cores = predict(costs, 1_000_000, num_cpus=16, placement=Placement())
    assert (many_cores.here_s, many_cores.bottleneck) == (pytest.approx(2000), "caption")
    one_decoder = predict(costs, 1_000_000, num_cpus=16, placement=Placement(max_decode_actors=1))
    assert (one_decoder.here_s, one_decoder.bottleneck) == (pytest.approx(10_000), "decode")


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_rows_of_tars_are_extrapolated_by_bytes(tmp_path, monkeypatch, ending):
    """Counting the rows of a thousand tars in a bucket would mean reading the tars."""
    monkeypatch.setattr(size_estimate, "SCANNED_ROWS_PER_TAR", 50)
    monkeypatch.setattr(size_estimate, "MAX_SCANNED_TARS", 4)
    for at in range(9):
        tar = tmp_path / f"{at}.tar"
        write_tar(tar, {f"{row}": os.urandom(10_000 * (1 + at % 3)) for row in range(150 + 20 * at)})
        if ending == "tar.gz":
            tar.with_name(f"{at}.tar.gz").write_bytes(gzip.compress(tar.read_bytes(), 1))
            tar.unlink()
    shards = list_shards(str(tmp_path))
    found = estimate_size(shards)
    truth = sum(150 + 20 * at for at in range(9))
    assert not found.is_counted
    if ending == "tar":
        assert found.min_rows <= truth <= found.max_rows
    assert 0.75 < found.num_rows / truth < 1.25
    assert found.num_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert estimate_size(list_shards(str(tmp_path), limit=200), 200).num_rows == 200


def test_empty_tars_are_the_sparsest(tmp_path, monkeypatch):
    """They used to count in the average but not in the bounds: about 8 rows were said to be 166 to 166."""
    monkeypatch.setattr(size_estimate, "SCANNED_ROWS_PER_TAR", 2)
    for at, num_rows in enumerate([0, 0, 6]):
        write_tar(tmp_path / f"{at}.tar", {f"{row}": b"image" for row in range(num_rows)})
    found = estimate_size(list_shards(str(tmp_path)))
    assert 0 == found.min_rows < found.num_rows < found.max_rows


def test_small_inputs_are_counted(tmp_path):
    write_tars(tmp_path, num_tars=3, rows_per_tar=11)
    found = estimate_size(list_shards(str(tmp_path)))
    assert (found.num_rows, found.is_counted) == (33, True)


def test_a_folder_is_sampled_at_equal_distances(tmp_path):
    """The first files of a sorted folder often come from one source."""
    for at in range(100):
        (tmp_path / f"{at:02}.png").write_bytes(png(at))
    taken = take_sample(list_shards(str(tmp_path)), ReadOptions(), 10)
    assert taken.rows["key"].to_pylist() == [f"{at}0.png" for at in range(10)]


def test_the_cost_of_opening_a_file_is_not_shared_by_the_sampled_rows_alone(monkeypatch):
    """Opening a tar in a bucket takes a second. Shared by four rows, it would make reading the bottleneck."""
    clock = 0.0

    def read(work, options):
        nonlocal clock
        clock += 1.0
        for start in range(0, 100, options.table_rows):
            clock += 0.001 * options.table_rows
            yield pa.table(
                {"image": [bytes(1 << 16)] * options.table_rows, "row": [start] * options.table_rows}
            )

    monkeypatch.setattr(sample, "read_shard", read)
    monkeypatch.setattr(cost, "perf_counter", lambda: clock)
    tars = [
        Shard(name=f"{at}", format="webdataset", root="/", files=(f"{at}",), size_bytes=1 << 30)
        for at in range(20)
    ]
    taken = take_sample(tars, ReadOptions(), 64)
    assert len(taken.rows) == 64 and len(taken.shards) == 16
    # one read-ahead of 4 MiB has 64 rows of 64 KiB
    assert taken.cost.wall_s == pytest.approx(1 / 64 + 0.001, rel=0.05)


def test_the_settings_in_each_footer_count_as_bytes_of_the_output(tmp_path):
    """Without these settings, files of small shards used to be estimated at half their size."""
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=2)
    few = make_plan(settings(tmp_path / "in"), FakeEngineConfig())
    many = make_plan(settings(tmp_path / "in", include=("*.tar", "x" * 5000)), FakeEngineConfig())
    assert many.output_bytes - few.output_bytes > 5000


def test_a_fragment_of_large_rows_has_fewer_of_them(tmp_path, monkeypatch):
    """With kept images of 5 MB, an array has no room for 512 rows, so the plan used to fail."""
    written = []
    write = stage_costs.write_fragment

    def note(folder, rows):
        written.append(rows)
        return write(folder, rows)

    monkeypatch.setattr(stage_costs, "write_fragment", note)
    monkeypatch.setattr(stage_costs, "FRAGMENT_BYTES", 4096)
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=600)
    make_plan(settings(tmp_path / "in", sample=8), FakeEngineConfig())
    assert 1 <= len(written[-1]) < 100
    monkeypatch.setattr(stage_costs, "FRAGMENT_BYTES", 1)
    assert stage_costs._rows_of_fragment(written[-1]) == 1


def test_the_cost_of_a_file_is_shared_by_the_rows_of_a_fragment_and_not_of_the_sample(tmp_path, monkeypatch):
    """With a slow store, writing used to be estimated eight times too slow, and then was the bottleneck."""
    commit = stage_costs.commit_shard

    def slow(*args, **options):
        time.sleep(0.2)
        return commit(*args, **options)

    monkeypatch.setattr(stage_costs, "commit_shard", slow)
    for name, rows in (("large", 600), ("small", 2)):
        write_tars(tmp_path / name, num_tars=1, rows_per_tar=rows)
    large, small = (
        make_plan(settings(tmp_path / name, sample=8), FakeEngineConfig()).stage_costs.costs["write"].wall_s
        for name in ("large", "small")
    )
    assert 0.2 / 512 <= large < small / 10 and small >= 0.2 / 2


def test_failures_of_the_sample_are_counted_and_shown(tmp_path):
    write_tars(tmp_path / "in", num_tars=2, rows_per_tar=20, broken_every=4)
    cut = tmp_path / "in" / "cut.tar"
    write_tar(cut, {"whole": png(0), "lost": png(1)})
    cut.write_bytes(cut.read_bytes()[:3000])
    found = make_plan(settings(tmp_path / "in"), FakeEngineConfig())
    said = "\n".join(found.lines())
    assert found.by_status == {"ok": 31, "undecodable": 10}
    assert "31 ok, 10 undecodable" in said and "image-000003: undecodable: " in said
    assert said.count(": undecodable: ") == MAX_ERRORS_SHOWN and ": ok: " not in said
    assert f"... and {10 - MAX_ERRORS_SHOWN} more" in said
    assert "partial: " in said and "cut.tar" in said
    assert "exit status 2" in said


def test_as_many_failures_as_are_allowed_are_not_too_many(tmp_path):
    """1 - 0.95 is a little more than 0.05."""
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=20, broken_every=20)
    found = make_plan(settings(tmp_path / "in", max_failed_fraction=0.05), FakeEngineConfig())
    assert found.by_status["undecodable"] == 1
    assert "exit status 2" not in "\n".join(found.lines())


def test_an_input_without_decodable_images_is_refused_with_the_reason(tmp_path):
    write_tar(tmp_path / "0.tar", {"a": BROKEN, "b": BROKEN})
    with pytest.raises(ValueError, match=r"none of the 2 sampled images can be decoded .*; check the input"):
        make_plan(settings(tmp_path), FakeEngineConfig())


def test_what_would_stop_the_job_is_one_sentence(tmp_path, monkeypatch, capsys):
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=4)
    engine = FakeEngineConfig()
    assert plan(settings(tmp_path / "in", prompt="unservable"), engine) == 3
    assert "--prompt must be servable" in capsys.readouterr().err
    retrieval = save_tiny_retrieval_checkpoint(tmp_path / "retrieval")
    matched = Outputs(score=("fit=caption",), score_model=str(retrieval))
    assert plan(settings(tmp_path / "in", outputs=matched), engine) == 3
    assert "--score-model must take images of 32 px" in capsys.readouterr().err

    def fail(*_):
        raise EngineFault("RuntimeError: the device is gone")

    monkeypatch.setattr(CaptionStage, "__call__", fail)
    assert plan(settings(tmp_path / "in"), engine) == 1
    assert capsys.readouterr().err == "blip2: the engine has failed: RuntimeError: the device is gone\n"


def test_writing_is_timed_in_the_output_and_leaves_nothing_there(tmp_path):
    """A fragment left there would count as finished rows of a run."""
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=5)
    output = tmp_path / "out"
    output.mkdir()
    (output / "other").touch()
    found = make_plan(settings(tmp_path / "in", output=str(output)), FakeEngineConfig())
    assert os.listdir(output) == ["other"]
    assert 50 < found.stage_costs.row_bytes < 500 and found.stage_costs.file_bytes > 500
    assert found.output_bytes == 5 * found.stage_costs.row_bytes + found.stage_costs.file_bytes


def test_files_of_a_killed_plan_are_leftovers_and_no_results(tmp_path, monkeypatch):
    """The glob `**/*.parquet` must not match the sample of a plan, and the next run must delete it."""
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=5)
    output = tmp_path / "new" / "out"
    make_plan(settings(tmp_path / "in", output=str(output)), FakeEngineConfig())
    assert os.listdir(tmp_path) == ["in"], "folders that the plan has made are deleted"
    monkeypatch.setattr(Folder, "erase", lambda self, under="": None)
    make_plan(settings(tmp_path / "in", output=str(output)), FakeEngineConfig())
    (output / "_blip2" / "probe-1").touch()
    left = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert len(left) == 2 and not list(output.rglob("*.parquet"))
    assert set(scan_output(Folder(str(output))).leftovers) == left


def test_the_command_on_the_demonstration_checkpoint(tmp_path, capsys):
    write_tars(tmp_path / "in", num_tars=2, rows_per_tar=8)
    command = ["plan", "--input", str(tmp_path / "in"), "--model", "demo", "--num-threads", "1"]
    command += ["--skip-self-test", "--sample", "8", "--max-new-tokens", "4"]
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {name: set(said[name]) for name in KEYS_OF_JSON} == KEYS_OF_JSON
    assert said["input"]["num_rows"] == 16
    assert said["sample"] == {"num_rows": 8, "by_status": {"ok": 8}}
    assert set(said["prediction"]["stages"]) == {"read", "decode", "caption", "write"}
    assert said["prediction"]["actor_s"] > 0
    assert main([*command, "--sample", "0"]) == 3
    assert "--sample must be at least 1, got 0" in capsys.readouterr().err


def test_embed_and_score_are_planned_as_their_own_jobs(tmp_path, capsys):
    """Planned as captions, they would have a language model's time and the bytes of another output."""
    table = pa.table({"image": [png(n) for n in range(6)], "alt": ["text"] * 6})
    pq.write_table(table, tmp_path / "a.parquet")
    input, engine = (str(tmp_path / "a.parquet"),), FakeEngineConfig(trace=str(tmp_path / "trace"))
    embedding = make_plan(PlanEmbedSettings(input=input), engine)
    scoring = make_plan(PlanScoreSettings(input=input, text_column="alt", name="fit", sample=4), engine)
    for found, name, num_rows in ((embedding, "embedding", 6), (scoring, "fit", 4)):
        assert len(found.stage_costs.rows) == num_rows and found.by_status == {"ok": num_rows}
        assert None not in found.stage_costs.rows[name].to_pylist()
        assert "caption" not in found.stage_costs.rows.column_names
    assert not captions_made(tmp_path / "trace")
    assert plan(PlanScoreSettings(input=input, text_column="words"), engine) == 3
    assert "text to score must be one of the columns image, alt, got 'words'" in capsys.readouterr().err
    for command in ("embed", "score --text-column alt"):
        assert main(["plan", *command.split(), "--input", *input, "--sample", "0"]) == 3
        assert "--sample must be at least 1, got 0" in capsys.readouterr().err


def test_numbers_of_bytes_have_three_digits_and_a_unit():
    said = [format_bytes(n) for n in (1, 7, 1234, 999_600, 56_789_000, 1.2e9, 3.4e12, 5.6e15)]
    assert said == ["1 byte", "7 bytes", "1.23 kB", "1 MB", "56.8 MB", "1.2 GB", "3.4 TB", "5,600 TB"]


def test_a_plan_says_what_quantization_changes(tmp_path, monkeypatch):
    """The demonstration model, with weights of so few bits that captions change."""
    files = {}
    for number, picture in enumerate(draw(SceneSampler("held_out", 0).sample(6), 64)):
        Image.fromarray(picture).save(file := io.BytesIO(), "PNG")
        files[str(number)] = file.getvalue()
    write_tar(tmp_path / "in" / "0.tar", files)
    monkeypatch.setattr(int8, "HALF_WEIGHT", 1)
    choice = QuantizationChoice(method="int8", parts=PARTS, weight_bits=7, instructions="here")
    monkeypatch.setattr(quantizing, "MAX_LAYER_ERROR", 100)
    engine = EngineConfig(
        model="demo",
        device="cpu",
        dtype="float32",
        num_threads=1,
        quantize="int8",
        quantization_choice=choice,
        skip_self_test=True,
    )
    found = make_plan(settings(tmp_path / "in", engine=engine, sample=6))
    effect = found.stage_costs.quantization
    assert effect is not None and effect.num_changed is not None
    assert effect.num_changed > 3
    assert effect.num_identical == 6 - effect.num_changed
    key, before, after = effect.changed[0]
    assert before != after and before.startswith("a")
    printed = "\n".join(found.lines())
    assert f"{effect.num_identical} captions as without it, {effect.num_changed} changed" in printed
    assert f"{key}: {before!r} becomes {after!r}" in printed
    assert re.search(r"images/s per actor instead of .* GiB instead of", printed)
    assert found.to_dict()["quantization"]["num_changed"] == effect.num_changed
    assert 0 < effect.engine_bytes < effect.plain_engine_bytes


def test_tensors_are_counted_once_and_those_without_memory_are_not():
    """Compiling leaves fake tensors behind, whose memory cannot be read."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        without_memory = [torch.zeros(1 << 20), torch.zeros(1 << 20, device="meta")]
    before = tensor_bytes()
    kept = torch.zeros(1000)
    with_memory = [kept, kept[10:], torch.nn.Parameter(torch.zeros(500))]
    assert tensor_bytes() - before == 4 * 1500
    del without_memory, with_memory


def test_a_long_method_stands_apart_from_its_effect():
    effect = QuantizationEffect(
        method="int8-weights",
        num_identical=23,
        num_changed=1,
        mean_logprob_change=None,
        changed=(),
        images_per_s=2.0,
        plain_images_per_s=1.0,
        engine_bytes=1 << 30,
        plain_engine_bytes=2 << 30,
    )
    assert list(effect.lines()) == [
        "int8-weights 23 captions as without it, 1 changed",
        "          2.0 images/s per actor instead of 1.0; 1.00 GiB instead of 2.00",
    ]


def test_a_plan_without_quantization_compares_nothing(tmp_path):
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=2)
    found = make_plan(settings(tmp_path / "in"), FakeEngineConfig())
    assert found.to_dict()["quantization"] is None


def test_a_price_gives_the_cost_of_the_input_and_of_a_million_rows(tmp_path, capsys):
    write_tars(tmp_path / "in", num_tars=2, rows_per_tar=50)
    found = make_plan(settings(tmp_path / "in", price_per_hour=3.6), FakeEngineConfig(seconds_per_image=0.01))
    assert found.cost is not None
    assert found.cost == pytest.approx(found.prediction.actor_s * 0.001)
    assert 0.9e-3 <= found.cost <= 1e-3 * SLACK
    line = next(line for line in found.lines() if line.startswith("cost"))
    said = re.search(r"([\d.]+) per million rows", line)
    assert said is not None
    assert float(said[1]) == pytest.approx(found.cost * 1e6 / 100, abs=0.01)
    assert found.to_dict()["cost"] == found.cost
    with pytest.raises(ValueError, match="price_per_hour must be 0 or more, got -1"):
        settings(tmp_path / "in", price_per_hour=-1)


@pytest.mark.parametrize(
    ("deadline", "stage", "said", "meets"),
    [
        ("1h", "caption", "deadline  1h, which one actor meets on ", True),
        (
            "30s",
            "caption",
            "deadline  30s, before which no image is captioned, because of the start-up; ",
            False,
        ),
        ("40s", "caption", "; 2 actors that never wait would", False),
        ("40s", "read", ", where read is the bottleneck", False),
    ],
)
def test_a_plan_says_whether_the_deadline_is_met(tmp_path, deadline, stage, said, meets):
    """A plan used to accept --deadline and ignore it. A job stops 20 s before it, and takes 10 s to start."""
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=4)
    found = make_plan(settings(tmp_path / "in", deadline=deadline), FakeEngineConfig())
    costs = found.stage_costs.costs | {stage: Cost(wall_s=14.0 / 4, cpu_s=14.0)}
    found = dataclasses.replace(
        found, stage_costs=dataclasses.replace(found.stage_costs, costs=costs, start_s=0.0)
    )
    assert found.to_dict()["meets_deadline"] is meets
    assert said in next(line for line in found.lines() if line.startswith("deadline"))


@pytest.mark.parametrize("settings_type", [PlanSettings, PlanEmbedSettings])
def test_a_deadline_that_passes_while_a_plan_is_made_does_not_refuse_it(tmp_path, monkeypatch, settings_type):
    """The time used to be checked again after the measurements, and the plan was lost."""

    class AnHourLater(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(hours=1)

    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=4)
    soon = f"{datetime.now(UTC) + timedelta(minutes=30):%Y-%m-%dT%H:%M}"
    planned = settings_type(input=(str(tmp_path / "in"),), deadline=soon)
    monkeypatch.setattr(deadline_module, "datetime", AnHourLater)
    lines = "\n".join(make_plan(planned, FakeEngineConfig()).lines())
    assert f"deadline  {soon}, before which no image is captioned" in lines


def test_a_sample_whose_captions_are_flagged_would_end_the_run_with_2(tmp_path):
    """A plan used to accept --max-flagged-fraction and ignore it."""
    rows = [png(0)] * 24  # one image, and so one caption
    write_tar(tmp_path / "in" / "0.tar", {f"{n}": image for n, image in enumerate(rows)})
    for limit, is_said in ((0.5, True), (1.0, False)):
        found = make_plan(settings(tmp_path / "in", max_flagged_fraction=limit), FakeEngineConfig())
        assert any(line.startswith("flags     100.0% of the sample's") for line in found.lines()) is is_said


def test_a_plan_on_a_cluster_needs_one(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    write_tars(tmp_path / "in", num_tars=1, rows_per_tar=2)
    assert main(["plan", str(tmp_path / "in"), "--on-cluster"]) == 3
    assert "--on-cluster needs the address of a cluster in RAY_ADDRESS" in capsys.readouterr().err
