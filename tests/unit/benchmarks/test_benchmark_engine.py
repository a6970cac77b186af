"""What the engine's benchmark has found is not lost with what it has not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from benchmarks import engine as benchmark


class FakeContender:
    """Notes what happens to either side; a reference whose batch is too large dies."""

    happened: ClassVar[list[str]] = []

    def __init__(self, make: type, *_: object, **__: object) -> None:
        self.name = make.__name__
        self.happened.append(f"{self.name} begins")

    def call(self, method: str, *args: Any) -> Any:
        if args == (128,):
            raise RuntimeError("a contender has died")
        if method == "first_caption_s":
            return 1.0
        return [[1]] * 4

    def close(self) -> float:
        self.happened.append(f"{self.name} ends")
        return 2.0


def test_what_was_measured_on_a_gpu_is_kept_when_the_rest_is_not(monkeypatch, tmp_path: Path) -> None:
    """Time on a GPU is lent by the minute: a run that is cut must have left the engine's figure, and each
    of the reference's that came in time. The engine's memory must be free by then."""
    monkeypatch.setattr(benchmark, "Contender", FakeContender)
    case = benchmark.Case("midsize", num_images=4, reference_batches=(64, 128))
    kept: list[dict[str, Any]] = []

    def keep(found: dict[str, Any]) -> None:
        FakeContender.happened.append("kept")
        kept.append(dict(found))

    with pytest.raises(RuntimeError, match="has died"):
        benchmark.run(case, tmp_path, "cuda", None, False, 2, True, keep)
    happened = FakeContender.happened
    first_figure = next(i for i, found in enumerate(kept) if "images_per_s" in found)
    assert [event for event in happened if event != "kept"] == [
        "EngineSide begins",
        "EngineSide ends",
        "ReferenceSide begins",
    ]
    assert happened[: happened.index("EngineSide ends")].count("kept") == first_figure + 1
    assert kept[-1]["images_per_s"] > 0
    assert kept[-1]["peak_memory_gib"] == 2.0
    assert list(kept[-1]["ratios"]) == ["reference at 64"]
