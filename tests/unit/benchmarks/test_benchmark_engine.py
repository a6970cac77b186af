"""The engine's benchmark keeps the figures it has when the rest of a run fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from benchmarks.engine import measuring
from benchmarks.engine.cases import Case
from blip2_actor import EngineConfig


class FakeContender:
    """Record each event of the sides; a reference whose batch is too large dies."""

    events: ClassVar[list[str]] = []

    def __init__(self, make: type, *_: object, **__: object) -> None:
        self.name = make.__name__
        self.events.append(f"{self.name} begins")

    def call(self, method: str, *args: Any) -> Any:
        if args == (128,):
            raise RuntimeError("a contender died")
        if method == "first_caption_s":
            return 1.0
        return [[1]] * 4

    def close(self) -> float:
        self.events.append(f"{self.name} ends")
        return 2.0


def test_figures_of_a_gpu_are_kept_when_the_rest_of_the_run_fails(monkeypatch, tmp_path: Path) -> None:
    """Time on a GPU is limited: an interrupted run must have kept the engine's figure and each figure of the
    reference that came in time. The engine's memory must be free before the reference starts."""
    monkeypatch.setattr(measuring, "Contender", FakeContender)
    case = Case("midsize", num_images=4, reference_batches=(64, 128))
    config = EngineConfig(model=str(tmp_path), device="cuda")
    kept: list[dict[str, Any]] = []

    def keep(found: dict[str, Any]) -> None:
        FakeContender.events.append("kept")
        kept.append(dict(found))

    with pytest.raises(RuntimeError, match="contender died"):
        measuring.measure_case(case, config, 4, 2, with_vision=False, keep=keep)
    events = FakeContender.events
    first_figure = next(i for i, found in enumerate(kept) if "images_per_s" in found)
    assert [event for event in events if event != "kept"] == [
        "EngineSide begins",
        "EngineSide ends",
        "ReferenceSide begins",
    ]
    assert events[: events.index("EngineSide ends")].count("kept") == first_figure + 1
    assert kept[-1]["images_per_s"] > 0
    assert kept[-1]["peak_memory_gib"] == 2.0
    assert list(kept[-1]["ratios"]) == ["reference at 64"]
