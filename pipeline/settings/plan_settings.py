"""The settings of `blip2 plan` and its variants: the settings of a job, and the size of the sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.settings.job_settings import CaptionSettings, EmbedSettings, ScoreSettings


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Settings that a plan has in addition to the settings of its job."""

    output: str = ""
    """Folder or URI in which writing is timed; no file stays there. An earlier run of the model in this
    output tells how long the start takes. Default: a temporary local folder."""
    sample: int = 64
    """Number of rows to read, decode, caption and write."""
    on_cluster: bool = False
    """Measure in one worker of the Ray cluster at RAY_ADDRESS, with the accelerator that a captioning actor
    reserves, instead of on this machine."""
    price_per_hour: float | None = None
    """What one hour of a captioning actor and of the cores that keep it busy costs; the plan then has the
    cost of the input and of a million rows, in the same currency."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # of the job's settings, which stand next in line
        if self.sample < 1:
            raise ValueError(f"sample must be at least 1, got {self.sample}")
        if self.price_per_hour is not None and not 0 <= self.price_per_hour < math.inf:
            raise ValueError(f"price_per_hour must be 0 or more, got {self.price_per_hour}")


@dataclass(frozen=True, kw_only=True)
class PlanSettings(PlanOptions, CaptionSettings):
    """Predict time, workers, bottleneck and bytes of a caption command from a sample."""


@dataclass(frozen=True, kw_only=True)
class PlanEmbedSettings(PlanOptions, EmbedSettings):
    """Predict time, workers, bottleneck and bytes of an embed command from a sample."""


@dataclass(frozen=True, kw_only=True)
class PlanScoreSettings(PlanOptions, ScoreSettings):
    """Predict time, workers, bottleneck and bytes of a score command from a sample."""


AnyPlanSettings = PlanSettings | PlanEmbedSettings | PlanScoreSettings
