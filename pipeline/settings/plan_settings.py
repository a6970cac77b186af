"""The settings of `blip2 plan` and its variants: the settings of a job, and the size of the sample."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.settings.job_settings import CaptionSettings, EmbedSettings, ScoreSettings


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Settings that a plan has in addition to the settings of its job."""

    output: str = ""
    """Folder or URI in which writing is timed; no file stays there. Default: a temporary local folder."""
    sample: int = 64
    """Number of rows to read, decode, caption and write."""
    json: bool = False
    """Print one JSON object."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # of the job's settings, which stand next in line
        if self.sample < 1:
            raise ValueError(f"sample must be at least 1, got {self.sample}")


@dataclass(frozen=True, kw_only=True)
class PlanSettings(PlanOptions, CaptionSettings):
    """Predict time, workers, bottleneck and bytes of a caption command from a sample. Needs no Ray."""


@dataclass(frozen=True, kw_only=True)
class PlanEmbedSettings(PlanOptions, EmbedSettings):
    """Predict time, workers, bottleneck and bytes of an embed command from a sample."""


@dataclass(frozen=True, kw_only=True)
class PlanScoreSettings(PlanOptions, ScoreSettings):
    """Predict time, workers, bottleneck and bytes of a score command from a sample."""


AnyPlanSettings = PlanSettings | PlanEmbedSettings | PlanScoreSettings
