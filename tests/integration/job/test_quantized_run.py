"""A quantized run records which layers it quantized, and a resume quantizes the same ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from blip2_actor import EngineConfig, QuantizationChoice
from pipeline.cli.commands import caption
from pipeline.ledger.ledger import Ledger
from pipeline.report.status import RunStatus
from pipeline.settings.job_settings import CaptionSettings
from pipeline.storage.folder import Folder
from tests.integration.inputs import write_tars

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.slow]


def test_a_run_says_what_its_first_worker_has_chosen_and_what_all_have_quantized(tmp_path: Path) -> None:
    write_tars(tmp_path / "in", num_tars=2, rows_per_tar=2)
    engine = EngineConfig(model="demo", device="cpu", quantize="int8", skip_self_test=True)
    settings = CaptionSettings(
        input=(str(tmp_path / "in" / "part0"),), output=str(tmp_path / "out"), engine=engine
    )
    assert caption(settings) == 0
    ledger = Ledger(Folder(settings.output))
    chosen = ledger.require_run().quantization
    assert chosen is not None and chosen.parts == ()  # so small a checkpoint gains nothing
    assert json.loads((tmp_path / "out/_blip2/run.json").read_text())["quantization"] == {
        "method": "int8",
        "parts": [],
        "weight_bits": chosen.weight_bits,
        "instructions": chosen.instructions,
        "time_fractions": [],
    }

    # No measurement would make this choice here, so the second start must have read it from the record.
    recorded = QuantizationChoice(method="int8", parts=("qformer",), weight_bits=7, instructions="AVX2")
    run = dataclasses.replace(ledger.require_run(), quantization=recorded)
    ledger.begin(run)
    more = dataclasses.replace(settings, input=(*settings.input, str(tmp_path / "in/part1")), add_new=True)
    assert caption(more) == 0
    lines = [
        line for line in RunStatus.read(settings.output).lines() if line.startswith("quantized by 1 worker")
    ]
    assert len(lines) == 2
    assert "7-bit weights" in lines[1] and "qformer 0 of" not in lines[1] and "vision 0 of" in lines[1]
