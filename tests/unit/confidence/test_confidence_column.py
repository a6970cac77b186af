"""The column `confidence` and the flag of captions below the limit exist only with a calibration."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow as pa
import pytest

from blip2_actor import Calibration, GenerationOptions
from blip2_actor.testing import FakeEngineConfig
from pipeline.caption_counts import CaptionCounts
from pipeline.inputs.reader import ReadOptions
from pipeline.ledger.layout import output_name
from pipeline.run.prepare import prepare, prepare_retry
from pipeline.settings.caption_spec import CaptionSpec
from pipeline.settings.fingerprint import FingerprintMismatch
from pipeline.settings.from_dict import from_dict
from pipeline.settings.job_settings import CaptionSettings
from pipeline.settings.outputs import Outputs
from pipeline.settings.retry_settings import RetrySettings
from pipeline.stages.caption import CaptionStage
from pipeline.stages.output_rows import output_columns
from tests.unit.stages.decoded_tables import decoded, pixels_of

INFO = FakeEngineConfig().info()


@pytest.fixture
def calibration(tmp_path: Path) -> Calibration:
    """A calibration by which the captions of the fake engine (3 tokens) have a confidence of 0.3."""
    made = Calibration(
        coefficients={"log_odds": 0.0, "num_tokens": 1.0},
        intercept=0.0,
        curve=((0.0, 0.0), (10.0, 1.0)),
        model=INFO.digest,
        options=dataclasses.asdict(GenerationOptions().resolve(INFO.generation_config)),
    )
    made.save(tmp_path / "c.json")
    return made


def settings(tmp_path: Path, min_confidence: float = 0.0, **changes) -> CaptionSettings:
    outputs = Outputs(calibration=str(tmp_path / "c.json"), min_confidence=min_confidence)
    return CaptionSettings(input=("in",), output="out", **({"outputs": outputs} | changes))


@pytest.mark.parametrize(("limit", "flags"), [(0.0, []), (0.1, []), (0.5, ["abstained"])])
def test_a_caption_keeps_its_text_and_says_how_sure_it_is(tmp_path, calibration, limit, flags):
    stage = CaptionStage(settings(tmp_path, limit).spec(FakeEngineConfig()))
    places = {"key": pa.array(["a", "b"]), "shard": pa.array(["s", "s"]), "row": pa.array([0, 1])}
    images = [pixels_of(1), pixels_of(2)]
    table = decoded(images, status=pa.array(["ok", "undecodable"]), **places)
    rows = output_columns(stage(table), [], stage)
    assert rows.schema.field("confidence").type == pa.float32()
    good, bad = rows.to_pylist()
    assert good["confidence"] == pytest.approx(0.3) and good["caption"]
    assert good["flags"] == flags and good["status"] == "ok"
    assert bad["confidence"] is None and bad["flags"] == []
    assert CaptionCounts.of_rows(rows).num_flagged == 0, "abstaining is no fault of a caption"
    stage.close()


def test_without_a_calibration_there_is_no_such_column():
    stage = CaptionStage(CaptionSpec(engine=FakeEngineConfig()))
    assert "confidence" not in stage(decoded([pixels_of(1)])).column_names
    stage.close()


def test_its_file_may_be_in_a_bucket(tmp_path, calibration):
    outputs = Outputs(calibration=(tmp_path / "c.json").as_uri())
    found = outputs.read_calibration()
    assert found is not None and found.digest == calibration.digest
    outputs = Outputs(calibration=(tmp_path / "none.json").as_uri())
    with pytest.raises(
        ValueError, match=r"^calibration must be a file that can be read, got file:.*none\.json"
    ):
        outputs.read_calibration()


def test_its_password_is_not_stored():
    outputs = Outputs(calibration="s3://me:word@bucket/c.json?region=eu-west-1")
    stored = CaptionSettings(input=("in",), output="out", outputs=outputs).to_dict()
    assert stored["outputs"]["calibration"] == "s3://bucket/c.json"


def test_it_is_part_of_the_fingerprint_and_of_the_record(tmp_path, calibration):
    plain = CaptionSettings(input=("in",), output="out")
    given = settings(tmp_path, 0.5)
    assert "confidence" not in plain.fingerprint(INFO).parts
    differences = given.fingerprint(INFO).differences(plain.fingerprint(INFO))
    assert [one.partition(":")[0] for one in differences] == [
        "confidence.calibration",
        "confidence.min_confidence",
    ]
    assert from_dict(CaptionSettings, given.to_dict()) == given
    assert not {"calibration", "min_confidence"} & set(plain.to_dict()["outputs"])
    dataclasses.replace(calibration, intercept=1.0).save(tmp_path / "c.json")
    assert given.fingerprint(INFO).differences(plain.fingerprint(INFO)) != differences


def test_a_calibration_of_other_captions_is_refused_before_work(tmp_path, calibration):
    def check(**changes) -> None:
        settings(tmp_path, **changes).spec(FakeEngineConfig()).check(INFO)

    check()
    with pytest.raises(ValueError, match="calibration must be of captions with the prompt of this run"):
        check(prompt="a photo of")
    with pytest.raises(ValueError, match="with the prompt of this run"):
        check(reading=ReadOptions(prompt_column="question"))
    with pytest.raises(ValueError, match="with the options of generation of this run"):
        check(generation=GenerationOptions(num_beams=3))
    dataclasses.replace(calibration, model="other").save(tmp_path / "c.json")
    with pytest.raises(ValueError, match="with the model of this run"):
        check()


def finished_run(tmp_path: Path, **changes) -> Path:
    """Leave a run as if it were finished, and return its output."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"-")
    changes |= {"input": (str(tmp_path / "in"),), "output": str(tmp_path / "out")}
    job = prepare(dataclasses.replace(settings(tmp_path, 0.5), **changes), FakeEngineConfig())
    job.ledger.begin(job.run)
    for shard in job.run.shards:
        job.ledger.folder.put(output_name(shard.name), b"")
    return tmp_path / "out"


def test_a_retry_scores_as_the_run_did_and_is_told_where_the_file_is_now(tmp_path, calibration):
    """If its file had been moved, or its URI held a password, a run could not be retried."""
    output = str(finished_run(tmp_path))

    def scored_with(**values) -> tuple[str, float]:
        job = prepare_retry(RetrySettings(output=output, **values), FakeEngineConfig())
        spec = job.settings.spec(job.engine)
        assert spec.calibration is not None
        return spec.calibration.digest, spec.outputs.min_confidence

    assert scored_with() == (calibration.digest, 0.5)
    moved = (tmp_path / "c.json").rename(tmp_path / "moved.json")
    with pytest.raises(ValueError, match=r"^calibration must be a file that can be read, got .*c\.json"):
        scored_with()
    assert scored_with(calibration=str(moved)) == (calibration.digest, 0.5)
    dataclasses.replace(calibration, intercept=1.0).save(moved)
    with pytest.raises(FingerprintMismatch, match=r"confidence\.calibration"):
        scored_with(calibration=str(moved))


def test_a_retry_gives_no_confidences_to_a_run_without_them(tmp_path, calibration):
    output = str(finished_run(tmp_path, outputs=Outputs()))
    with pytest.raises(ValueError, match="calibration must be left out for a run without one"):
        prepare_retry(RetrySettings(output=output, calibration="c.json"), FakeEngineConfig())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_confidence": 1.5}, "min_confidence must be from 0 to 1, got 1.5"),
        ({"min_confidence": 0.5}, "min_confidence must be left out without calibration"),
        ({"calibration": "c", "caption": False, "embed": ("v=vision",)}, "if no captions are made"),
        ({"calibration": "c", "ask": ("confidence=what?",)}, "ask must not name columns .* confidence"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Outputs(**values)


def test_a_run_without_a_calibration_may_keep_a_column_of_that_name(tmp_path, calibration):
    """Earlier runs have such columns, and must resume."""
    reading = ReadOptions(keep=("confidence",))
    CaptionSettings(input=("in",), output="out", reading=reading)
    with pytest.raises(ValueError, match="calibration adds the column confidence, which is there already"):
        settings(tmp_path, reading=reading)


def test_a_regenerated_caption_has_no_confidence(tmp_path, calibration):
    """It was generated with other options than the calibrated captions."""
    outputs = Outputs(calibration=str(tmp_path / "c.json"), min_confidence=0.5, regenerate=True)
    stage = CaptionStage(settings(tmp_path, outputs=outputs, prompt="a photo of").spec(FakeEngineConfig()))
    (row,) = stage(decoded([pixels_of(1)])).to_pylist()
    assert row["flags"] == ["regenerated"] and row["confidence"] is None
    stage.close()
