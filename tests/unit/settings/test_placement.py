"""The settings of placement: contradictions are refused where they are given."""

from __future__ import annotations

import re
from typing import Any

import pytest

from blip2_actor import EngineConfig
from pipeline.settings.job_settings import CaptionSettings
from pipeline.settings.placement import Placement
from pipeline.settings.retry_settings import PlacementChanges


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"gpus_per_actor": 1.5}, "gpus_per_actor must be a whole number, or a fraction of one GPU, got 1.5"),
        ({"gpus_per_actor": -1}, "gpus_per_actor must be"),
        ({"gpus_per_actor": float("nan")}, "gpus_per_actor must be"),
        ({"accelerator": "NPU"}, "accelerator must be NAME=N such as NPU=1, got 'NPU'"),
        ({"accelerator": "NPU=0"}, "accelerator must be NAME=N"),
        ({"accelerator": "CPU=4"}, "accelerator must be NAME=N"),
        ({"accelerator": "NPU=1", "gpus_per_actor": 1}, "accelerator must be left out with"),
        ({"accelerator": "NPU=1", "accelerator_type": "L40S"}, "accelerator must be left out with"),
        ({"decode_label": ("pool",)}, "decode_label must be KEY=VALUE such as pool=gpu, got 'pool'"),
    ],
)
def test_a_wrong_value_is_refused_by_name(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Placement(**values)


@pytest.mark.parametrize(
    "values", [{"gpus_per_actor": 1}, {"accelerator": "NPU=1"}, {"accelerator_type": "T4"}]
)
def test_an_accelerator_for_the_cpu_is_refused(values: dict[str, Any]) -> None:
    """The actors used to reserve accelerators and to compute on CPUs next to them."""
    engine = EngineConfig(device="cpu")
    with pytest.raises(ValueError, match="device must be auto with"):
        CaptionSettings(input=("in",), output="out", placement=Placement(**values), engine=engine)


def test_a_retry_may_change_to_another_accelerator() -> None:
    before = Placement(gpus_per_actor=0.5, accelerator_type="L40S", caption_label=("pool=gpu",))
    other = PlacementChanges(accelerator="NPU=1").apply(before)
    assert other == Placement(accelerator="NPU=1", caption_label=("pool=gpu",))
    assert PlacementChanges(gpus_per_actor=2).apply(other).accelerator is None
